"""Results of compared runs as files: OUTPUT.json and OUTPUT.png."""

import json
import shlex
from pathlib import Path

from ..command import result_file
from .plot import plot_losses
from .runs import Run

_FROM_RECORD = (
    "device",
    "threads",
    "python",
    "versions",
    "commit",
    "cuda_graphs",
    "corpus_sha256",
    "tokenizer_sha256",
)


def write_results(output: Path, figures: dict, runs: dict[str, Run]) -> None:
    """Write figures, commands, device, versions and loss curves.

    Args:
        output: Path of the files, without a suffix.
        figures: What was compared; the head of the JSON.
        runs: Runs by the name in the legend; the control first.
    """
    record = list(runs.values())[-1].record
    result = {
        **figures,
        **{key: record.get(key) for key in _FROM_RECORD},
        "commands": [shlex.join(run.record["command"][1:]) for run in runs.values()],
        "train_loss": {name: run.train for name, run in runs.items()},
        "validation": {name: run.validation for name, run in runs.items()},
    }
    result_file(output, ".json").write_text(json.dumps(result, indent=1) + "\n")
    model = record["config"]["model"]
    title = f"{model['name']} {model['flavor']}, {record['device']}"
    plot_losses(runs, title, result_file(output, ".png"))
