"""bf16, PTQ and QAT of one model on the same text, from one command.

    base run (bf16) --checkpoint--> tuned in bf16 --finalize--> PTQ of each recipe
                          \\------> tuned by QAT  --finalize--> QAT of each recipe

Both tunings see the same batches with the same learning rate, so bf16 / PTQ / QAT differ in
nothing but quantization. A run that has finished is not run again.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..convergence import read_run
from ..errors import ConfigError
from .evaluate import evaluate
from .finalize import FinalizeOptions, finalize

_LOG = "log.txt"


@dataclass(frozen=True)
class TableOptions:
    """What is trained and evaluated.

    Attributes:
        recipes: Deploy recipes.
        base_steps: Steps of the base run.
        tune_steps: Steps of each tuning.
        tune_lr: Its learning rate.
        device: Where finalize and evaluate compute.
        seq_len: Tokens of a sequence of the evaluation.
        batch: Its sequences a batch.
        steps: Its batches.
        dataset: Its text.
        calibration_dataset: Text of static scales.
    """

    recipes: tuple[str, ...] = ("nvfp4", "int8_act_int4_weight")
    base_steps: int = 1000
    tune_steps: int = 200
    tune_lr: float = 1e-4
    device: str = "cpu"
    seq_len: int = 256
    batch: int = 4
    steps: int = 64
    dataset: str = "stdlib_validation"
    calibration_dataset: str = "stdlib"


def three_way(config: Path, folder: Path, options: TableOptions, extra: list[str]) -> dict:
    """Train, finalize and evaluate.

    Args:
        config: TOML of the job, with validation.
        folder: Where runs and checkpoints go; what is there is reused.
        options: TableOptions.
        extra: torchtitan options of every run.

    Returns:
        "models": results by row, "step_time_ratio": a QAT step's time over bf16's by recipe.

    Raises:
        ConfigError: a run that failed.
    """
    base = folder / "base"
    _train(config, base, options.base_steps, ["--model.converters", "", *extra])
    tuning = [
        f"--checkpoint.initial_load_path={base / 'checkpoint' / f'step-{options.base_steps}'}",
        f"--optimizer.lr={options.tune_lr}",
        f"--lr_scheduler.warmup_steps={max(1, options.tune_steps // 20)}",
        *extra,
    ]
    tuned = folder / "bf16"
    _train(config, tuned, options.tune_steps, ["--model.converters", "", *tuning])
    models, ratios = {"bf16": _evaluate(folder, tuned, "bf16", "final_bf16", options)}, {}
    control = read_run(tuned).seconds_per_step
    for recipe in options.recipes:
        run = folder / f"qat_{recipe}"
        converter = ["--model.converters=qat", f"--qat.recipe={recipe}"]
        _train(config, run, options.tune_steps, [*converter, *tuning])
        models[f"PTQ {recipe}"] = _evaluate(folder, tuned, recipe, f"final_ptq_{recipe}", options)
        models[f"QAT {recipe}"] = _evaluate(folder, run, recipe, f"final_qat_{recipe}", options)
        ratios[recipe] = read_run(run).seconds_per_step / control
    return {"models": models, "step_time_ratio": ratios}


def _evaluate(folder: Path, run: Path, recipe: str, name: str, options: TableOptions) -> dict:
    target = folder / name
    if not target.exists():
        given = FinalizeOptions(
            recipe,
            calibration_dataset=options.calibration_dataset,
            seq_len=options.seq_len,
            device=options.device,
        )
        finalize(run, target, given)
    return evaluate(
        target,
        dataset=options.dataset,
        seq_len=options.seq_len,
        batch=options.batch,
        steps=options.steps,
        device=options.device,
    )


def _train(config: Path, folder: Path, steps: int, options: list[str]) -> None:
    if (folder / "checkpoint" / f"step-{steps}" / ".metadata").is_file():
        return
    if (folder / _LOG).is_file():
        shutil.rmtree(folder)  # an interrupted run of this comparison: it begins anew
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds something else than a run: use another --runs folder")
    command = [
        sys.executable,
        "-m",
        "nvfp4_titan.train",
        f"--job.config_file={config}",
        f"--training.steps={steps}",
        f"--job.dump_folder={folder}",
        "--checkpoint.enable",
        f"--checkpoint.interval={steps}",
        "--checkpoint.last_save_model_only",
        "--metrics.enable_tensorboard",
        "--metrics.save_tb_folder=tb",
        *options,
    ]
    print(" ".join(command[1:]), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOG, "w") as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise ConfigError(f"the run of {folder.name} failed: see {folder / _LOG}")
