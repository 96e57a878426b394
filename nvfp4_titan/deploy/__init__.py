"""From a run to a checkpoint that an inference engine loads: QAT, finalize, evaluate."""

from .modules import convert_prepared, prepare
from .recipes import DEPLOY_RECIPES, DeployRecipe, get_deploy_recipe

__all__ = [
    "DEPLOY_RECIPES",
    "DeployRecipe",
    "convert_prepared",
    "get_deploy_recipe",
    "prepare",
]
