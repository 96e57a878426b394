"""bf16, PTQ and QAT of one model on the same text, from one command.

    base run (bf16) --checkpoint--> tuned in bf16 --finalize--> PTQ of each recipe
                          \\------> tuned by QAT  --finalize--> QAT of each recipe

Both tunings see the same batches with the same learning rate, so bf16 / PTQ / QAT differ in
nothing but quantization. A run or an evaluation that has finished is not made again.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..convergence.launch import Job, read_request, settings, validates
from ..convergence.runs import Run
from ..deploy import get_deploy_recipe
from ..deploy.table import TableOptions
from ..errors import ConfigError, OutOfTime
from ..toml import read_toml
from .checks import check_model
from .evaluate import check_device, check_text, evaluate
from .finalize import FinalizeOptions, finalize
from .sharding import model_args
from .trainer import parse

_OWN = {
    "model.converters": "--recipes",
    "qat.recipe": "--recipes",
    "training.steps": "--base-steps and --tune-steps",
    "checkpoint.initial_load_path": "--runs",
}
"""What differs between the runs of a comparison, by option, and what sets it."""


@dataclass(frozen=True)
class Comparison:
    """The runs and evaluations behind a table.

    Attributes:
        config: TOML of the job, with validation.
        folder: Where runs and checkpoints go; what is there is reused.
        options: TableOptions.
        extra: torchtitan's options of every run; the tuning's own learning rate and warm-up win.
        deadline: `time.monotonic()` after which nothing new is begun; a run is saved and stopped.

    Raises:
        ConfigError: the TOML is not there or has no validation, a recipe is unknown, or options of
            every run name what the columns differ in.
    """

    config: Path
    folder: Path
    options: TableOptions
    extra: tuple[str, ...] = ()
    deadline: float | None = None

    def __post_init__(self):
        config, given = read_toml(self.config), settings(self.extra)
        if taken := [name for name in _OWN if name in given]:
            raise ConfigError(
                f"--{taken[0]} after -- is what the columns differ in: use {_OWN[taken[0]]}"
            )
        if not validates(config, self.extra):
            raise ConfigError(
                f"the base's validation loss is told: set validation.enable in {self.config}"
            )
        if not self.options.recipes:
            raise ConfigError("--recipes is empty: name one deploy recipe or more")
        for recipe in self.options.recipes:
            get_deploy_recipe(recipe)
        self._check_evaluation()

    def _check_evaluation(self) -> None:
        """Check what is asked for only once runs have ended."""
        options, job = self.options, parse([f"--job.config_file={self.config}", *self.extra])
        check_device(options.device)
        check_text(options.dataset, options.seq_len, options.batch, options.steps)
        check_text(options.calibration_dataset, options.seq_len, options.batch, options.steps)
        check_model(job.model)
        longest = model_args(job).max_seq_len
        if options.seq_len > longest:
            raise ConfigError(
                f"--seq-len {options.seq_len} is longer than the model's {longest}: give {longest} "
                "or less"
            )

    def parts(self, recipes: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
        """Train, finalize and evaluate: (recipe, its part of the table) as each is done.

        Raises:
            ConfigError: a run that failed, or a folder that holds something else.
            OutOfTime: the deadline came first; the same call goes on.
        """
        control = ("--model.converters", "")
        base = self._run("base", self.options.base_steps, control)
        tuned = self._run("bf16", self.options.tune_steps, (*control, *self._tuning))
        bf16 = self._evaluate(tuned, "bf16")
        for recipe in recipes:
            converter = ("--model.converters=qat", f"--qat.recipe={recipe}")
            run = self._run(f"qat_{recipe}", self.options.tune_steps, (*converter, *self._tuning))
            seconds = {"bf16": tuned.seconds_per_step, "QAT": run.seconds_per_step}
            yield (
                recipe,
                {
                    "bf16": bf16,
                    "PTQ": self._evaluate(tuned, recipe),
                    "QAT": self._evaluate(run, recipe),
                    "seconds_per_step": seconds,
                    "step_time_ratio": seconds["QAT"] / seconds["bf16"],
                    "base_validation_loss": base.validation[max(base.validation)],
                    "machine": run.record["device"],
                    "torch": run.record["versions"]["torch"],
                    "commit": run.record["commit"],
                    "cuda_graphs": run.record["cuda_graphs"],
                },
            )

    @property
    def _tuning(self) -> tuple[str, ...]:
        options = self.options
        step = self.folder / "base" / "checkpoint" / f"step-{options.base_steps}"
        return (
            f"--checkpoint.initial_load_path={step}",
            f"--optimizer.lr={options.tune_lr}",
            f"--lr_scheduler.warmup_steps={max(1, options.tune_steps // 20)}",
        )

    def _run(self, name: str, steps: int, options: tuple[str, ...]) -> Run:
        job = Job(
            self.config,
            self.folder / name,
            (
                *self.extra,
                *options,
                f"--training.steps={steps}",
                "--checkpoint.enable",
                f"--checkpoint.interval={steps}",
                "--checkpoint.last_save_model_only",
            ),
        )
        self._check_time()
        return job.run(self.deadline)

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime("the time limit came first: call it again to go on")

    def _evaluate(self, run: Run, recipe: str) -> dict:
        """Finalize a run with a recipe and evaluate that, once."""
        self._check_time()
        target = self.folder / f"final_{run.folder.name}_{recipe}"
        options = self.options
        given = {
            "dataset": options.dataset,
            "seq_len": options.seq_len,
            "batch": options.batch,
            "steps": options.steps,
            "device": options.device,
        }
        finalizing = FinalizeOptions(
            recipe,
            # What the run multiplied in, so that the deployed model does too.
            dtype=run.record["config"]["training"]["mixed_precision_param"],
            calibration_dataset=options.calibration_dataset,
            seq_len=options.seq_len,
            device=options.device,
        )
        # A run that is made again is another.
        source = [read_request(run.folder), run.record["started"]]
        made_from = {"run": source, "finalize": repr(finalizing)}
        done = self.folder / f"{target.name}.json"
        kept = json.loads(done.read_text()) if done.is_file() else {}
        if kept.get("made_from") != made_from or not target.exists():
            shutil.rmtree(target, ignore_errors=True)
            finalize(run.folder, target, finalizing)
            kept = {"made_from": made_from}
            done.write_text(json.dumps(kept))
        if kept.get("options") != given:
            result = evaluate(target, **given) | {"model": target.name}
            kept |= {"options": given, "result": result}
            done.write_text(json.dumps(kept))
        return kept["result"]
