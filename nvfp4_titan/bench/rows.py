"""Rows of a benchmark: assembling, comparing, printing, writing, drawing. Needs no GPU.

A result file holds a list of rows. `name` says whose row it is: "triton" is in the names of ours,
"peer" in those of others, "bf16" (or "copy") in the control's. Ratios compare rows of one run and
one case only; above 1 is faster than the control.
"""

import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ..command import result_file
from ..version import source_commit


@dataclass(frozen=True)
class Environment:
    """What a result depends on besides the code."""

    device: str
    torch: str
    triton: str
    python: str
    commit: str
    command: str

    @staticmethod
    def current() -> "Environment":
        """This process's; device is the current GPU."""
        return Environment(
            device=torch.cuda.get_device_name(),
            torch=torch.__version__,
            triton=version("triton"),
            python=platform.python_version(),
            commit=source_commit() or "unknown",
            command=shlex.join(sys.argv),
        )


@dataclass(frozen=True)
class BenchRow:
    """One measured variant of one case.

    Attributes:
        name: Variant.
        case: What the rows that are compared have in common.
        sizes: M, K, N, ... by name.
        values: ms, tokens_per_s, ... by name: medians.
    """

    name: str
    case: str
    sizes: dict[str, int]
    values: dict[str, float] = field(default_factory=dict)

    def with_values(self, **values: float) -> "BenchRow":
        """This row with more values."""
        return BenchRow(self.name, self.case, self.sizes, {**self.values, **values})


def ratios(
    rows: Iterable[BenchRow], control: str, name: str, speed: Callable[[BenchRow], float]
) -> list[BenchRow]:
    """Rows with their speed relative to the control's of the same case.

    Args:
        rows: All rows of a run.
        control: Name of the control's rows; each case has one.
        name: Name of the value to add, such as "ratio_to_bf16".
        speed: Of a row, in any unit that is larger for faster.

    Raises:
        ValueError: a case has no control, or several.
    """
    rows = list(rows)
    found: dict[str, float] = {}
    for row in rows:
        if row.name == control:
            if row.case in found:
                raise ValueError(f"case {row.case!r} has several rows named {control!r}")
            found[row.case] = speed(row)
    missing = {row.case for row in rows} - set(found)
    if missing:
        raise ValueError(f"cases {sorted(missing)} have no row named {control!r}")
    return [row.with_values(**{name: speed(row) / found[row.case]}) for row in rows]


def as_json(rows: Iterable[BenchRow], environment: Environment) -> list[dict]:
    """Rows as they are written: flat, each with its environment."""
    return [
        {"name": row.name, "case": row.case, **row.sizes, **row.values, **asdict(environment)}
        for row in rows
    ]


def print_table(rows: Iterable[BenchRow]) -> None:
    """Print rows, one line each, values by their names."""
    for row in rows:
        sizes = " ".join(f"{name}={size}" for name, size in row.sizes.items())
        values = "  ".join(f"{name} {value:.4g}" for name, value in row.values.items())
        print(f"{row.case:<24} {sizes:<28} {row.name:<32} {values}", flush=True)


def write(
    rows: list[BenchRow], output: Path, ratio: str, title: str, environment: Environment
) -> None:
    """Write OUTPUT.json and OUTPUT.png.

    Args:
        rows: All rows of a run.
        output: Path without a suffix.
        ratio: Name of the value that is drawn.
        title: Title of the figure.
        environment: Of the run.
    """
    content = json.dumps(as_json(rows, environment), indent=1) + "\n"
    result_file(output, ".json").write_text(content)
    _plot(rows, result_file(output, ".png"), ratio, f"{title}, {environment.device}")


def _plot(rows: list[BenchRow], path: Path, ratio: str, title: str) -> None:
    figure = Figure(figsize=(9, 1 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{row.case}: {row.name}" for row in rows]
    colors = [
        "C0" if "triton" in row.name else "C1" if "peer" in row.name else "0.6" for row in rows
    ]
    bars = axes.barh(range(len(rows)), [row.values[ratio] for row in rows], color=colors)
    axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.set(title=title, xlabel=ratio.replace("_", " "))
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    figure.savefig(path, dpi=120)
