#!/usr/bin/env python
"""bf16 / PTQ / QAT of a TOML of yours: scripts/compare_qat.py CONFIG --output results/qat

Options after -- go to every run: scripts/compare_qat.py CONFIG --output o -- --compile.no-enable
Interrupted, it goes on when called again with the same --runs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from nvfp4_titan.errors import UserError
from nvfp4_titan.titan import cpu_runtime


@dataclass
class Arguments:
    """Train a base in bf16, tune it in bf16 and by QAT, and evaluate bf16, PTQ and QAT."""

    config: tyro.conf.Positional[Path]
    """TOML of the job; validation must be enabled."""
    output: Path
    """Path of the results, without a suffix."""
    runs: Path = Path("outputs/compare_qat")
    """Folder of the runs and checkpoints."""
    recipes: tuple[str, ...] = ("nvfp4", "int8_act_int4_weight")
    """Deploy recipes."""
    base_steps: int = 1000
    """Steps of the base run."""
    tune_steps: int = 200
    """Steps of each tuning."""
    tune_lr: float = 1e-4
    """Learning rate of the tunings."""
    device: str = "cpu"
    """Where finalize and evaluate compute."""
    seq_len: int = 256
    """Tokens of a sequence of the evaluation."""
    batch: int = 4
    """Sequences of a batch of the evaluation."""
    steps: int = 64
    """Batches of the evaluation."""
    dataset: str = "stdlib_validation"
    """Text of the evaluation."""
    calibration_dataset: str = "stdlib"
    """Text that static activation scales are taken from."""


def main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    given = vars(tyro.cli(Arguments, args=argv[:split])).copy()
    cpu_runtime.install()
    from nvfp4_titan.titan import job_config  # noqa: F401  registers flavors and datasets
    from nvfp4_titan.titan.evaluate import format_table, write_results
    from nvfp4_titan.titan.qat_table import TableOptions, three_way

    config, output, runs = (given.pop(name) for name in ("config", "output", "runs"))
    try:
        found = three_way(config, runs, TableOptions(**given), argv[split + 1 :])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"step_time_ratio": found["step_time_ratio"], "options": given | {"gpu": gpu}}
    command = " ".join(["scripts/compare_qat.py", *argv])
    write_results(output, found["models"], about | {"command": command, "torch": torch.__version__})
    print(format_table(found["models"]))
    print(f"seconds of a QAT step over bf16's: {found['step_time_ratio']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
