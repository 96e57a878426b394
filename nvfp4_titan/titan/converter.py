"""The `nvfp4` model converter: settings to `convert`, checked before anything is built."""

from torch import distributed, nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.moe import utils as moe_utils
from torchtitan.protocols.model_converter import ModelConverter
from torchtitan.tools.logging import logger

from ..backends import resolve
from ..errors import ConfigError, UnsupportedError
from ..formats import BLOCK
from ..recipe import Change, Selection, get_recipe, parse_rules, parse_schedule
from ..training import Report, convert, keep_no_codes, refresh_weights, track_weights
from ..training.experts import WrappingExperts
from ..training.report import EXPERTS
from . import activation_checkpoint, record


class Converter(ModelConverter):
    """What the converters share: what FSDP, experts, CUDA graphs and the optimizer ask for.

    Raises:
        UnsupportedError: a combination that quantized weights or gradients do not survive.
    """

    report: Report | None = None
    title = ""
    """Before its report in the log."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        self.job_config = job_config
        check_cuda_graphs(job_config, parallel_dims)
        check_early_steps(job_config, parallel_dims)
        self.frees_weights = frees_weights(job_config, parallel_dims)
        activation_checkpoint.install()

    def settle(self, model: nn.Module, report: Report) -> None:
        """Finish the conversion of a model, and print and write its report once."""
        self.report = report
        if self.frees_weights:
            keep_no_codes(model)
        if _has_converted_experts(report):
            align_token_groups()
        if first_rank():
            logger.info(f"{self.title}{report}")
            record.write_conversion(self.job_config, report)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """The weights changed: take their amaxes again, where they are tracked."""
        for part in model if isinstance(model, list) else [model]:
            refresh_weights(part)


class NVFP4Converter(Converter):
    """Converts linears (and experts) of the model as the [nvfp4] section says.

    Raises:
        ConfigError: a setting that cannot be used.
        UnsupportedError: the backend, or a parallelism that NVFP4 layers do not support.
    """

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        check_settings(job_config)
        super().__init__(job_config, parallel_dims)
        self.settings = job_config.nvfp4
        self.keeps_weights = _keeps_weights(job_config, parallel_dims)
        if self.settings.keep_weights == "always" and parallel_dims.fsdp_enabled:
            _warn_of_sharded_weights(self.settings)
        logs = ["numerics_log_freq"] if self.settings.numerics_log_freq else []
        for name in [*_changes(self.settings), *logs]:
            if not self.settings.trainer_knows_step:
                raise UnsupportedError(
                    f"nvfp4.{name} acts at certain steps, and a converter sees neither the step "
                    "that a checkpoint restores nor a validation: start with "
                    "-m nvfp4_titan.train in place of -m torchtitan.train"
                )

    def convert(self, model: nn.Module) -> None:
        """Convert in place and print the report once."""
        report = convert_by_settings(model, self.settings)
        check_gathers(model, self.job_config)
        track_weights(
            model,
            fp4_all_gather=self.settings.fp4_all_gather,
            keep_weights=self.keeps_weights,
            keep_codes=self.settings.keep_weights != "never",
        )
        self.settle(model, report)


def first_rank() -> bool:
    """Whether this process speaks for all; also before there are others."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def frees_weights(job_config: JobConfig, parallel_dims: ParallelDims) -> bool:
    """Whether FSDP frees gathered weights between a layer's forward and its backward."""
    policy = job_config.parallelism.fsdp_reshard_after_forward
    reshards = policy == "always" or (policy == "default" and not parallel_dims.pp_enabled)
    ac = job_config.activation_checkpoint
    # A checkpointed block runs its forward right before its backward: nothing is kept for long.
    checkpointed = ac.mode == "full" or (ac.mode == "selective" and ac.selective_ac_option == "op")
    return parallel_dims.fsdp_enabled and reshards and not checkpointed


def _keeps_weights(job_config: JobConfig, parallel_dims: ParallelDims) -> bool:
    """Whether weights' quantized forms are kept from an optimizer step to the next."""
    setting = job_config.nvfp4.keep_weights
    if setting != "auto":
        return setting == "always"
    return _has_microbatches(job_config, parallel_dims)


def _warn_of_sharded_weights(settings) -> None:
    if first_rank() and not settings.fp4_all_gather:
        logger.warning(
            "nvfp4.keep_weights = 'always' keeps nothing of weights that FSDP shards: set "
            "nvfp4.fp4_all_gather = true, whose shards are kept in codes"
        )


def _has_microbatches(job_config: JobConfig, parallel_dims: ParallelDims) -> bool:
    """Whether a step calls the model several times."""
    training, ranks = job_config.training, parallel_dims.dp_replicate * parallel_dims.dp_shard
    # torchtitan's default, a batch for every rank's local one, is any number below 1.
    accumulates = training.global_batch_size > training.local_batch_size * ranks
    return accumulates or parallel_dims.pp_enabled


def check_cuda_graphs(job_config: JobConfig, parallel_dims: ParallelDims) -> None:
    """Check that inductor's CUDA graphs, if they are on, leave gradients alone.

    Raises:
        UnsupportedError: a step has several microbatches. A replayed backward writes its gradients
            where the last one's are, and torch says nothing.
    """
    if record.uses_cuda_graphs(job_config) and _has_microbatches(job_config, parallel_dims):
        raise UnsupportedError(
            "with inductor's CUDA graphs a microbatch's gradients overwrite those of the one "
            "before: unset TORCHINDUCTOR_CUDAGRAPHS, or have one microbatch a step "
            "(training.global_batch_size, parallelism.pipeline_parallel_degree)"
        )


def check_early_steps(job_config: JobConfig, parallel_dims: ParallelDims) -> None:
    """Check that weights change once a step, after which their amaxes are taken.

    Raises:
        UnsupportedError: the optimizer steps in the backward of every microbatch.
    """
    early = job_config.optimizer.early_step_in_backward
    if early and _has_microbatches(job_config, parallel_dims):
        raise UnsupportedError(
            "optimizer.early_step_in_backward changes weights in every microbatch, and what is "
            "known of quantized ones is taken once a step: set it to false, or have one "
            "microbatch a step (training.global_batch_size, parallelism.pipeline_parallel_degree)"
        )


def schedule(job_config: JobConfig) -> tuple[Change, ...]:
    """The changes of formats that a job asks for, by step.

    Raises:
        ConfigError: a malformed change.
    """
    return parse_schedule(job_config.nvfp4.schedule, job_config.training.steps)


def _changes(settings) -> list[str]:
    """Which settings of an [nvfp4] section change formats during a run."""
    asked = {"schedule": any(settings.schedule), "validation_recipe": settings.validation_recipe}
    return [name for name, value in asked.items() if value]


def switches(settings) -> dict[str, bool]:
    """Parts of recipes that an [nvfp4] section keeps or drops."""
    return {name: getattr(settings, name) for name in ("rht", "sr", "weights_2d", "tensor_scale")}


def convert_by_settings(model: nn.Module, settings) -> Report:
    """Convert a whole model in place as an [nvfp4] section says.

    Raises:
        ConfigError: a setting that cannot be used, or nothing converted that it could change.
        UnsupportedError: the backend cannot run here.
    """
    report = convert(
        model,
        recipe=settings.recipe,
        rules=settings.rules,
        bf16_first_layers=settings.bf16_first_layers,
        bf16_last_fraction=settings.bf16_last_fraction,
        experts=settings.experts,
        backend=settings.backend,
        seed=settings.seed,
        **switches(settings),
    )
    for name in _changes(settings):
        if not report.converted:
            raise ConfigError(
                f"nvfp4.{name} has nothing to change: recipe {settings.recipe!r} converts no module"
            )
    return report


def check_gathers(model: nn.Module, job_config: JobConfig) -> None:
    """Check that what fp4_all_gather hands out can be used.

    Raises:
        ConfigError: experts whose weights torchtitan casts to bf16, in fp32 compute: codes cannot
            be cast.
    """
    if not job_config.nvfp4.fp4_all_gather:
        return
    grouped = any(
        isinstance(module, WrappingExperts) and getattr(module, "use_grouped_mm", False)
        for module in model.modules()
    )
    if grouped and job_config.training.mixed_precision_param == "float32":
        raise ConfigError(
            "nvfp4.fp4_all_gather with experts needs training.mixed_precision_param = 'bfloat16' "
            "(torchtitan casts experts to bf16, and codes cannot be cast): set that, "
            "nvfp4.experts = false, or fp4_all_gather = false"
        )


def _has_converted_experts(report: Report) -> bool:
    """Whether any routed expert runs quantized."""
    return any(entry.converted and entry.kind == EXPERTS for entry in report.entries)


def align_token_groups() -> None:
    """Have torchtitan pad every expert's tokens to a multiple of NVFP4's block of 16.

    Then no tokens need padding again inside; a multiple that another converter asked for stays.

    Raises:
        ConfigError: another component set a size that 16 neither divides nor is divided by.
    """
    current = moe_utils.TOKEN_GROUP_ALIGN_SIZE_M
    if BLOCK % current and current % BLOCK:
        raise ConfigError(
            f"torchtitan's token groups are aligned to {current}: NVFP4 experts need a multiple of "
            f"{BLOCK}; drop the converter that set it, or set nvfp4.experts = false"
        )
    if current % BLOCK:
        moe_utils.set_token_group_alignment_size_m(BLOCK)
        logger.info(f"Token groups of experts are aligned to {BLOCK} (from {current})")


OURS = ("nvfp4", "qat")
"""Names of this project's converters, and of their sections."""


def without_settings(converter: str) -> ConfigError:
    """What to say where a job's config module does not know a converter of ours."""
    return ConfigError(
        f"the {converter} converter needs its settings: add --job.custom_config_module "
        "nvfp4_titan.titan.job_config, or have the JobConfig of your own config module derive from "
        "nvfp4_titan.titan.job_config.JobConfig"
    )


def check_settings(job_config: JobConfig) -> None:
    """Check what can be known before the model is built.

    Raises:
        ConfigError: a setting that cannot be used.
        UnsupportedError: the backend, or a parallelism that NVFP4 layers do not support.
    """
    if not hasattr(job_config, "nvfp4"):
        raise without_settings("nvfp4")
    settings = job_config.nvfp4
    _check_order(job_config.model.converters)
    resolve(settings.backend, get_recipe(settings.recipe))
    schedule(job_config)
    Selection(
        get_recipe(settings.recipe),
        parse_rules(settings.rules),
        settings.bf16_first_layers,
        settings.bf16_last_fraction,
    )
    if settings.fp4_all_gather and not settings.weights_2d:
        raise ConfigError(
            "nvfp4.fp4_all_gather sends one quantized weight for fprop and dgrad, which needs "
            "nvfp4.weights_2d = true: set that, or fp4_all_gather = false"
        )
    if settings.validation_recipe:
        resolve(settings.backend, get_recipe(settings.validation_recipe))
        if not job_config.validation.enable:
            raise ConfigError(
                f"nvfp4.validation_recipe = {settings.validation_recipe!r}, but nothing is "
                "validated: set validation.enable = true, or drop it"
            )
    for name in _changes(settings):
        if settings.fp4_all_gather:
            raise ConfigError(
                f"nvfp4.fp4_all_gather cannot follow nvfp4.{name}, which changes what is gathered: "
                "drop one of them"
            )
    if settings.numerics_log_freq < 0:
        raise ConfigError(
            f"nvfp4.numerics_log_freq = {settings.numerics_log_freq} must be a number of steps, or "
            "0 for none"
        )


def _check_order(converters: list[str]) -> None:
    # torchtitan's own converters swap every nn.Linear that they may, a converted one too.
    later = [name for name in converters[converters.index("nvfp4") :] if "quantize." in name]
    if later:
        raise ConfigError(
            f"model.converters lists {', '.join(later)} after nvfp4 and would take over its "
            "modules: list nvfp4 last; it leaves alone what the others converted, and says so"
        )
