"""NVFP4 training for torchtitan. Nothing here or below `titan` imports torchtitan."""

from .recipe import RECIPES, Recipe
from .training import convert
from .version import __version__

__all__ = ["RECIPES", "Recipe", "__version__", "convert"]
