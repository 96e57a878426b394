"""The `qat` model converter: trains for a deploy recipe, as the [qat] section says."""

from torch import nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from ..deploy import get_deploy_recipe, prepare
from ..errors import ConfigError, UnsupportedError
from ..training import Report, track_weights
from .converter import Converter, first_rank, without_settings
from .families import FAMILIES, FUSED


class QATConverter(Converter):
    """Prepares linears (and experts) of the model for a deploy recipe.

    Raises:
        ConfigError: a setting that cannot be used, or the nvfp4 converter beside this one.
        UnsupportedError: tensor parallelism with a recipe of codecs, or what no converter supports.
    """

    title = "QAT: "

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        check_qat(job_config)
        super().__init__(job_config, parallel_dims)

    def convert(self, model: nn.Module) -> None:
        """Prepare in place and print the report once."""
        settings = self.job_config.qat
        report = prepare_by_settings(model, settings)
        if get_deploy_recipe(settings.recipe).gemm is not None:
            track_weights(model, shared=FUSED if settings.share_scales else ())
        self.settle(model, report)
        name = self.job_config.model.name
        if first_rank() and name not in (family.name for family in FAMILIES):
            logger.warning(
                f"finalize.py will not read {name}: export it by torchtitan's own Hugging Face "
                "checkpoints, and quantize it elsewhere"
            )


def prepare_by_settings(model: nn.Module, settings) -> Report:
    """Prepare a whole model in place as a [qat] section says.

    Raises:
        ConfigError: a setting that cannot be used.
    """
    return prepare(
        model,
        settings.recipe,
        skip=settings.skip,
        experts=settings.experts,
        backend=settings.backend,
    )


def check_qat(job_config: JobConfig) -> None:
    """Check what can be known before the model is built.

    Raises:
        ConfigError: a setting that cannot be used.
        UnsupportedError: tensor parallelism with a recipe of codecs.
    """
    if not hasattr(job_config, "qat"):
        raise without_settings("qat")
    others = [name for name in job_config.model.converters if name != "qat"]
    if others:
        raise ConfigError(
            f"model.converters lists {', '.join(others)} beside qat, and one module has one "
            "converter: list qat alone"
        )
    recipe = get_deploy_recipe(job_config.qat.recipe)
    if recipe.gemm is None and job_config.parallelism.tensor_parallel_degree > 1:
        raise UnsupportedError(
            f"qat.recipe {recipe.name!r} groups a whole row of a weight, which tensor parallelism "
            "splits: set parallelism.tensor_parallel_degree = 1, or use nvfp4"
        )
