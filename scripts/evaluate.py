#!/usr/bin/env python
"""Loss and perplexity: scripts/evaluate.py MODEL [MODEL ..] --output results/name

Several models make one table: OUTPUT.json, OUTPUT.md and OUTPUT.png, bf16 / PTQ / QAT for one.
"""

import sys
from pathlib import Path

import torch
import tyro

from nvfp4_titan.command import reporting, result_file
from nvfp4_titan.errors import ConfigError
from nvfp4_titan.titan import cpu_runtime


@reporting
def main(
    models: tyro.conf.Positional[tuple[Path, ...]],
    output: Path | None = None,
    dataset: str = "stdlib_validation",
    seq_len: int = 256,
    batch: int = 4,
    steps: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    tokenizer: Path | None = None,
) -> int:
    """Evaluate models on the same text.

    Args:
        models: Runs, checkpoints, finalized or Hugging Face models.
        output: Path of the results, without a suffix.
        dataset: torchtitan's or this project's name of a dataset.
        seq_len: Tokens of a sequence.
        batch: Sequences of a batch.
        steps: Number of batches; 0 is the whole dataset.
        device: Where to compute.
        dtype: bfloat16 or float32; a finalized model's own where none is given.
        tokenizer: Folder of the tokenizer, where a model has none.
    """
    cpu_runtime.install()
    from nvfp4_titan.titan.evaluate import evaluate, format_table, write_results

    options = {
        "dataset": dataset,
        "seq_len": seq_len,
        "batch": batch,
        "steps": steps,
        "device": device,
        "dtype": dtype,
        "tokenizer": tokenizer,
    }
    if missing := [path for path in models if not path.is_dir()]:
        raise ConfigError(f"{missing[0]} is not a folder: give runs, checkpoints or models")
    if not models:
        raise ConfigError("no model is named: give a run, a checkpoint or a model")
    if output is not None:
        for suffix in (".json", ".md", ".png"):
            result_file(output, suffix)
    about = {"command": sys.argv, "device": device, "torch": torch.__version__}
    about |= {"dataset": dataset, "seq_len": seq_len}
    rows = {}
    for path in models:
        rows[str(path)] = evaluate(path, **options)
        if output is not None:
            write_results(output, rows, about)
    print(format_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
