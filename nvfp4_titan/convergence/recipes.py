"""Comparing recipes: one run of a user's TOML per row, and their table.

Rows are recipes by name; "bf16" is the control (no converter), "fp8" torchtitan's float8 (every
linear but the lm head and routers, the last blocks too). They run as a check's variants do
(check.py): an interrupted comparison goes on where it was.
"""

import torch

from ..command import markdown_table
from ..errors import ConfigError
from ..recipe import get_recipe
from .runs import Run, compare

CONTROL, FLOAT8 = "bf16", "fp8"
_CONVERTER = "quantize.linear.float8"
ROWS = (CONTROL, FLOAT8, "mxfp8", "nvfp4_mxfp8", "nvfp4_bf16", "nvfp4")
"""Rows of the published comparison (PyTorch's FP4 QAT study on Qwen3-8B), NVFP4 QAT being
nvfp4_bf16, and full NVFP4."""


def row_options(row: str) -> list[str]:
    """Options of torchtitan that make a run one row of the comparison.

    Raises:
        ConfigError: neither a recipe nor "fp8" (from `get_recipe`).
    """
    if row == CONTROL:
        return ["--model.converters", ""]
    if row != FLOAT8:
        get_recipe(row)
        return ["--model.converters=nvfp4", f"--nvfp4.recipe={row}"]
    return [f"--model.converters={_CONVERTER}", f"--{_CONVERTER}.filter_fqns=output,router"]


def machine_options(row: str) -> list[str]:
    """Options that a row needs on this machine, and another machine does without."""
    hardware = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    return [f"--{_CONVERTER}.emulate"] if row == FLOAT8 and not hardware else []


def table(runs: dict[str, Run]) -> dict[str, dict]:
    """Figures of each row, against the first.

    Raises:
        ConfigError: runs that did not see the same data, or whose times cannot be compared.
    """
    control = next(iter(runs.values()))
    rows = {}
    for name, run in runs.items():
        _check_machine(name, run, control)
        figures = compare(control, run)
        rows[name] = {
            "seconds_per_step": run.seconds_per_step,
            "step_time_ratio": figures["step_time_ratio"],
            "tokens_per_second": run.tokens_per_second,
            "peak_memory_gib": max(run.memory.values()),
            "validation_loss": figures["validation_loss"],
            "relative_gap": figures["relative_gap"],
            # torchtitan's float8 writes no report.
            "flops_share": run.flops_share if run.conversion else None,
        }
    return rows


def _check_machine(name: str, run: Run, control: Run) -> None:
    machines = [
        {
            "device": r.record["device"],
            "torch": r.record["versions"]["torch"],
            "CUDA graphs": r.record.get("cuda_graphs", False),
        }
        for r in (control, run)
    ]
    for key, value in machines[0].items():
        if machines[1][key] != value:
            raise ConfigError(
                f"step times of {name} and the control cannot be compared: {key} {value} and "
                f"{machines[1][key]}; run both alike, in folders that hold neither"
            )


def format_table(rows: dict[str, dict]) -> str:
    """The rows as a Markdown table."""
    head = ("recipe", "step, s", "of the control's", "tokens/s", "memory, GiB", "validation", "gap")
    cells = [
        (
            name,
            f"{row['seconds_per_step']:.3f}",
            f"{row['step_time_ratio']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_memory_gib']:.2f}",
            f"{row['validation_loss']:.4f}",
            f"{row['relative_gap']:+.2%}",
        )
        for name, row in rows.items()
    ]
    return "\n".join(markdown_table(head, cells))
