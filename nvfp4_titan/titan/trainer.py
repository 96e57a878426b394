"""torchtitan's Trainer on any device: early checks, what the CPU needs, the run's record."""

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer
from torchtitan.train import main as torchtitan_main

from ..errors import ConfigError, DivergedError
from ..scalars import CHECKSUM
from ..toml import read_toml
from ..training.schedule import FormatSchedule
from . import activation_checkpoint, cpu_runtime, moe_backward, record
from .checkpoints import checkpoint_folder, choose_step, explain_failures, newest_whole_step
from .checks import check
from .converter import (
    OURS,
    check_gathers,
    convert_by_settings,
    schedule,
    switches,
    without_settings,
)
from .loss import DividedLoss, replicas, sum_over_replicas
from .numerics_log import NumericsLog
from .pipeline import keep_token_counts
from .qat import prepare_by_settings
from .sharding import meta_model
from .stopping import StopRequest
from .validate import prepare_validator

CONFIG_MODULE = "nvfp4_titan.titan.job_config"
_CONFIG_FILE_KEYS = ("--job.config_file", "--job.config-file")


class NVFP4Trainer(Trainer):
    """torchtitan's Trainer that leaves a record of its run and stops when the loss is NaN.

    It also carries out nvfp4.schedule, nvfp4.numerics_log_freq (before the forward it knows the
    step, a restored one too) and nvfp4.validation_recipe.
    With checkpoints SIGTERM makes it save and end. TensorBoard gets `data/checksum`, of the tokens
    of a logged step on this rank: runs that saw the same data have the same ones.
    """

    def __init__(self, job_config: JobConfig):
        _normalize(job_config)
        check(job_config, _world_size(job_config, int(os.environ["WORLD_SIZE"])))
        keeps_record = os.environ["RANK"] == "0" and _has_steps_left(job_config)
        if keeps_record:
            record.clear(job_config)
        activation_checkpoint.install()
        converted = "nvfp4" in job_config.model.converters
        if converted:
            job_config.nvfp4.trainer_knows_step = True
        super().__init__(job_config)
        self.formats = _schedule(job_config, self.model_parts) if converted else FormatSchedule(())
        frequency = job_config.nvfp4.numerics_log_freq if converted else 0
        folder = Path(job_config.job.dump_folder)
        schedule = getattr(self, "pp_schedule", None)
        if schedule is not None:
            keep_token_counts(schedule, self.model_parts)
            schedule._loss_fn = self.pp_loss = DividedLoss(schedule._loss_fn)
        self.numerics = NumericsLog(self.model_parts, frequency, folder, schedule)
        cpu_runtime.prepare_trainer(self.model_parts)
        moe_backward.complete(self.model_parts, self.parallel_dims)
        if keeps_record:
            record.write(job_config, self.model_parts)
        self.stop = StopRequest()
        self.saves = job_config.checkpoint.enable and not job_config.checkpoint.load_only
        if self.saves:
            self.dataloader.worker_init_fn = self.stop.in_worker
        if job_config.validation.enable:
            if self.saves:
                self.validator.validation_dataloader.worker_init_fn = self.stop.in_worker
            steps = job_config.training.steps
            prepare_validator(self.validator, steps, self.formats.validating)
        self.steps_done, self.checksum = 0, 0

    def train(self) -> None:
        """Train, from the newest whole checkpoint; then record how tokens spread over experts.

        Raises:
            ConfigError: a checkpoint cannot be read or saved.
        """
        checkpoint, folder = self.job_config.checkpoint, checkpoint_folder(self.job_config)
        if checkpoint.enable and checkpoint.load_step == -1:
            checkpoint.load_step = choose_step(folder)
        explain_failures(self.checkpointer, folder)
        try:
            with self.stop if self.saves else nullcontext():
                super().train()
                if not self.steps_done:
                    self._validate_restored(self.step)
        except DivergedError:
            self._finish_saving()
            raise
        finally:
            self.numerics.close()  # of a training that diverges, too
        if distributed.get_rank() == 0 and (self.steps_done or self._validates(self.step)):
            record.write_tokens_per_expert(self.job_config, self.model_parts)

    def should_continue_training(self) -> bool:
        """As torchtitan's; no, once any rank was told to stop, after saving this step."""
        if not super().should_continue_training():
            return False
        checkpoint = self.job_config.checkpoint
        # Asking the other ranks waits for the device: where torchtitan waits anyway, or in time.
        asks = self.metrics_processor.should_log(self.step) or self.stop.due(self.step)
        asks = asks and self.saves and self.steps_done
        if not (asks and self.stop.anywhere(self.device, self.step)):
            return True
        if self.step % checkpoint.interval:
            record.flush(self.metrics_processor)
            self.checkpointer.interval = self.step  # this step is due
            self.checkpointer.save(self.step)
        self._finish_saving()
        logger.info(f"Told to stop: step {self.step} is saved, the same command goes on from it")
        return False

    def batch_generator(self, data_iterable: Iterable) -> Iterator:
        """As torchtitan's; keeps a checksum of the tokens for `train_step`."""
        for batch in super().batch_generator(data_iterable):
            if self.metrics_processor.should_log(self.step):
                self.checksum = zlib.crc32(batch[1].contiguous().numpy(), self.checksum)
            yield batch

    def forward_backward_step(self, **kwargs) -> torch.Tensor:
        """As torchtitan's; keeps the sum of the losses for `train_step`."""
        if self.parallel_dims.pp_enabled:
            self.pp_loss.divisor = kwargs["global_valid_tokens"]
        loss = super().forward_backward_step(**kwargs)
        self.step_loss = self.step_loss + loss.detach().sum()
        self.microbatches += 1
        copies = replicas(self.parallel_dims)
        if copies > 1 and self.microbatches == self.gradient_accumulation_steps:
            sum_over_replicas(self.model_parts, copies)
        return loss

    def train_step(self, data_iterator) -> None:
        """As torchtitan's, in the formats of this step; stops before a NaN is saved.

        Raises:
            DivergedError: the loss is NaN or infinite on a step that is logged or saved, or a
                weight on one that is saved.
        """
        if not self.steps_done:
            self._validate_restored(self.step - 1)
            if distributed.get_rank() == 0:
                record.clear_outcomes(self.job_config)
        self._change_formats(self.step)
        self.step_loss, self.checksum, self.microbatches = 0.0, 0, 0
        with self.numerics.step(self.step, self.metrics_processor):
            super().train_step(data_iterator)
        self.steps_done += 1
        if self.metrics_processor.should_log(self.step):
            # 24 bits: TensorBoard keeps fp32.
            checksum = {CHECKSUM: self.checksum & 0xFFFFFF}
            self.metrics_processor.logger.log(checksum, self.step)
        saves = self.saves and self.step % self.job_config.checkpoint.interval == 0
        last = self.step == self.job_config.training.steps
        # Reading the loss waits for the device: only where torchtitan waits anyway.
        if (saves or last or self.metrics_processor.should_log(self.step)) and not bool(
            torch.isfinite(self.step_loss)
        ):
            raise DivergedError(
                f"the loss is not finite at step {self.step}: lower optimizer.lr or raise "
                "lr_scheduler.warmup_steps, and resume from the last checkpoint"
            )
        # A gradient can be NaN where the loss is not: clipping then spreads it to all weights.
        if (saves or (last and self.saves)) and not _finite(self.model_parts):
            raise DivergedError(
                f"weights are not finite after step {self.step}, though its loss is: lower "
                "optimizer.lr, and resume from the last checkpoint"
            )
        if saves:
            record.flush(self.metrics_processor)

    def _finish_saving(self) -> None:
        """Wait for a checkpoint that is being saved asynchronously: torchtitan's end does not."""
        if self.saves:
            self.checkpointer._async_wait()

    def _validate_restored(self, step: int) -> None:
        """Validate again where a validation was due at the step of a checkpoint.

        The run may have died between the two.
        """
        if step and self._validates(step):
            self._change_formats(step)
            self.validator.validate(self.model_parts, step)

    def _change_formats(self, step: int) -> None:
        for change in self.formats.before_step(step):
            logger.info(f"From step {change.first_step} on: {change.gemm} as in {change.recipe}")

    def _validates(self, step: int) -> bool:
        return self.job_config.validation.enable and self.validator.should_validate(step)


def _has_steps_left(job_config: JobConfig) -> bool:
    """Whether a run goes on from its newest checkpoint: if not, its record stays as it is.

    Raises:
        ConfigError: it would go on with another text.
    """
    if not job_config.checkpoint.enable:
        return True
    saved, _ = newest_whole_step(checkpoint_folder(job_config))
    if saved > 0:
        record.check_text(job_config)
    return saved < job_config.training.steps


def _finite(model_parts: list[torch.nn.Module]) -> bool:
    """Whether this rank's parts of all weights are finite."""
    local = (
        p.to_local() if isinstance(p, DTensor) else p
        for part in model_parts
        for p in part.parameters()
    )
    return bool(torch.stack([p.detach().isfinite().all() for p in local]).all())


def run(argv: list[str], trainer_class: type[NVFP4Trainer] = NVFP4Trainer) -> None:
    """Train in this process, one rank, as torchtitan's command line says.

    Args:
        argv: torchtitan's options. The config module of nvfp4_titan is added where none is named.
        trainer_class: The trainer.

    Raises:
        UserError: settings that cannot be used, or a loss that is NaN.
    """
    # torchtitan's main() takes the command line; ConfigManager binds it when it is defined.
    ConfigManager.parse_args.__defaults__ = (_complete(argv),)
    torchtitan_main(trainer_class)


def preflight(argv: list[str], world_size: int) -> JobConfig:
    """Parse and check a job before any process of it starts; convert its model on meta.

    Args:
        argv: torchtitan's options.
        world_size: Processes the job will have, unless torchtitan simulates them.

    Returns:
        The parsed settings.

    Raises:
        UserError: settings that cannot be used.
    """
    job_config = parse(argv)
    check(job_config, _world_size(job_config, world_size))
    if {"nvfp4", "qat"} & set(job_config.model.converters):
        model = meta_model(job_config)
        if "qat" in job_config.model.converters:
            prepare_by_settings(model, job_config.qat)
        else:
            convert_by_settings(model, job_config.nvfp4)
            check_gathers(model, job_config)
            _schedule(job_config, [model])
    return job_config


def _schedule(job_config: JobConfig, model_parts: list[torch.nn.Module]) -> FormatSchedule:
    settings = job_config.nvfp4
    options = schedule(job_config), switches(settings), settings.validation_recipe
    return FormatSchedule(model_parts, *options)


def _world_size(job_config: JobConfig, processes: int) -> int:
    """Ranks of a job; torchtitan's dry-run modes play NGPU of them in one process."""
    simulated = job_config.comm.mode != "default"
    return int(os.environ.get("NGPU", "1")) if simulated else processes


def parse(argv: list[str]) -> JobConfig:
    """Settings of a job from its options and TOML.

    Raises:
        ConfigError: an unreadable TOML, an unknown key, a config module that is not there.
    """
    try:
        job_config = ConfigManager().parse_args(_complete(argv))
    except (ValueError, ImportError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        unknown = reason.partition("Invalid field names")[2].partition(". Please")[0]
        if missing := [name for name in OURS if f"'{name}'" in unknown]:
            raise without_settings(missing[0]) from error
        raise ConfigError(reason) from error
    _normalize(job_config)
    return job_config


def _normalize(job_config: JobConfig) -> None:
    # `--model.converters ""` is how a command line spells a TOML's empty list.
    if isinstance(job_config.model.converters, list):
        job_config.model.converters = [name for name in job_config.model.converters if name]


def _complete(argv: list[str]) -> list[str]:
    """The options, with our config module where neither they nor the TOML name one."""
    job = _load_toml(argv).get("job", {})
    if not isinstance(job, dict):
        raise ConfigError(f"job = {job!r} must be a section: [job]")
    in_argv = any("custom_config_module" in option.replace("-", "_") for option in argv)
    if job.get("custom_config_module") or in_argv:
        return argv
    return [*argv, f"--job.custom_config_module={CONFIG_MODULE}"]


def _load_toml(argv: list[str]) -> dict:
    """The job's TOML, {} where none is named."""
    path = None
    for i, arg in enumerate(argv):
        key, equals, value = arg.partition("=")
        if key in _CONFIG_FILE_KEYS:
            path = value if equals else next(iter(argv[i + 1 :]), "")
    return {} if path is None else read_toml(Path(path))
