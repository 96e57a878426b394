"""The file of bf16 / PTQ / QAT results: a table per model and machine, a part per recipe.

    {"tables": [{"model", "device", "options",
                 "recipes": {name: {"bf16", "PTQ", "QAT", "seconds_per_step", "step_time_ratio",
                                    "base_validation_loss", "machine", "torch", "commit",
                                    "cuda_graphs", "command"}}}]}

A recipe's three results come from one base run. A table can be made a recipe at a time, on machines
that keep nothing between calls: what a file holds already is not made again.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..command import markdown_table, result_file
from ..errors import ConfigError
from ..toml import toml_sha256

KINDS = ("bf16", "PTQ", "QAT")


@dataclass(frozen=True)
class TableOptions:
    """What is trained and evaluated."""

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

    def request(self, config: Path, extra: Iterable[str]) -> dict:
        """What must agree for a part to count: all but the recipes, which a table may add.

        Args:
            config: TOML of the runs.
            extra: torchtitan's options of every run.
        """
        asked = asdict(self)
        del asked["recipes"]
        return asked | {"config_sha256": toml_sha256(config), "extra": list(extra)}


def read_tables(file: Path) -> list[dict]:
    """The tables of a results file, none where it does not exist.

    Raises:
        ConfigError: it is something else.
    """
    if not file.is_file():
        return []
    try:
        return json.loads(file.read_text())["tables"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no file of bf16 / PTQ / QAT results: {error}") from error


def place(tables: list[dict], model: str, device: str, options: dict) -> dict:
    """The table of this model, device and these options, added where there is none yet."""
    about = {"model": model, "device": device, "options": options}
    for table in tables:
        if all(table[key] == value for key, value in about.items()):
            return table
    tables.append(about | {"recipes": {}})
    return tables[-1]


def merge(tables: list[dict], others: Iterable[dict]) -> None:
    """Add other tables' recipes to `tables` in place; what is there stays."""
    for other in others:
        table = place(tables, other["model"], other["device"], other["options"])
        table["recipes"] = other["recipes"] | table["recipes"]


def format_tables(tables: list[dict]) -> str:
    """Markdown, a line per model, machine and recipe."""
    head = ("model", "device", "recipe", "bf16", "PTQ", "QAT", "step time, QAT / bf16")
    rows = [
        (
            *(table["model"], table["device"], recipe),
            *(f"{part[kind]['perplexity']:.3f}" for kind in KINDS),
            f"{part['step_time_ratio']:.2f}",
        )
        for table in tables
        for recipe, part in table["recipes"].items()
    ]
    return "\n".join(markdown_table(head, rows))


def write_tables(output: Path, tables: list[dict]) -> None:
    """Write OUTPUT.json and OUTPUT.md."""
    result_file(output, ".json").write_text(json.dumps({"tables": tables}, indent=1) + "\n")
    result_file(output, ".md").write_text(format_tables(tables) + "\n")


def plot_tables(output: Path, tables: list[dict]) -> None:
    """Write OUTPUT.png: a panel per table, perplexity of the three by recipe."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(6, 3.2 * len(tables)), layout="constrained")
    for axes, table in zip(figure.subplots(len(tables), squeeze=False).flat, tables, strict=True):
        recipes = list(table["recipes"])
        for i, kind in enumerate(KINDS):
            heights = [table["recipes"][recipe][kind]["perplexity"] for recipe in recipes]
            places = [n + (i - 1) * 0.27 for n in range(len(recipes))]
            bars = axes.bar(places, heights, 0.25, label=kind)
            axes.bar_label(bars, fmt="%.3f", fontsize=7)
        axes.set_xticks(range(len(recipes)), recipes)
        axes.set(ylabel="perplexity", title=f"{table['model']}, {table['device']}")
        least = min(p["bf16"]["perplexity"] for p in table["recipes"].values())
        axes.set_ylim(bottom=0.95 * least)
        axes.legend()
    figure.savefig(result_file(output, ".png"), dpi=120)
