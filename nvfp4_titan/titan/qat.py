"""The `qat` model converter: trains for a deploy recipe, as the [qat] section says."""

from torch import distributed, nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import ModelConverter
from torchtitan.tools.logging import logger

from ..deploy import get_deploy_recipe, prepare
from ..errors import ConfigError, UnsupportedError
from ..training import Report, keep_no_codes, refresh_weights, track_weights
from . import activation_checkpoint, record
from .converter import (
    align_token_groups,
    check_early_steps,
    frees_weights,
    has_converted_experts,
    without_settings,
)
from .families import FAMILIES, FUSED


class QATConverter(ModelConverter):
    """Prepares linears (and experts) of the model for a deploy recipe.

    Raises:
        ConfigError: a setting that cannot be used, or the nvfp4 converter beside this one.
        UnsupportedError: tensor parallelism with a recipe of codecs.
    """

    report: Report | None = None

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        self.job_config = job_config
        check_qat(job_config)
        check_early_steps(job_config, parallel_dims)
        self.frees_weights = frees_weights(job_config, parallel_dims)
        activation_checkpoint.install()

    def convert(self, model: nn.Module) -> None:
        """Prepare in place and print the report once."""
        self.report = prepare_by_settings(model, self.job_config.qat)
        if get_deploy_recipe(self.job_config.qat.recipe).gemm is not None:
            shared = FUSED if self.job_config.qat.share_scales else ()
            track_weights(model, shared=shared)
        if self.frees_weights:
            keep_no_codes(model)
        if has_converted_experts(self.report):
            align_token_groups()
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            logger.info(f"QAT: {self.report}")
            if (name := self.job_config.model.name) not in (family.name for family in FAMILIES):
                logger.warning(
                    f"finalize.py will not read {name}: export it by torchtitan's own Hugging Face "
                    "checkpoints, and quantize it elsewhere"
                )
            record.write_conversion(self.job_config, self.report)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """The weights changed: take their amaxes again, where recipes track them."""
        if get_deploy_recipe(self.job_config.qat.recipe).gemm is None:
            return
        for part in model if isinstance(model, list) else [model]:
            refresh_weights(part)


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
