#!/usr/bin/env python
"""Make a quantized checkpoint: scripts/finalize.py RUN_OR_CHECKPOINT OUT --quantize RECIPE"""

import sys
from pathlib import Path

import tyro

from nvfp4_titan.command import reporting
from nvfp4_titan.titan import cpu_runtime


@reporting
def main(
    source: tyro.conf.Positional[Path],
    output: tyro.conf.Positional[Path],
    quantize: str,
    dtype: str = "bfloat16",
    skip: tuple[str, ...] = (),
    share_scales: bool | None = None,
    tokenizer: Path | None = None,
    calibration_dataset: str = "stdlib",
    calibration_batches: int = 8,
    device: str = "cpu",
) -> int:
    """Finalize a run, a checkpoint or a Hugging Face model.

    Args:
        source: Dump folder of a run, a checkpoint inside one, or a Hugging Face folder.
        output: Folder that must not exist.
        quantize: Deploy recipe, or bf16 for none.
        dtype: bfloat16 or float32, in which weights are quantized, or kept.
        skip: Globs of modules that stay in high precision.
        share_scales: One NVFP4 scale per tensor for q, k, v and for gate, up, as vLLM wants it; by
            default as a QAT run trained, and yes for others.
        tokenizer: Folder of the tokenizer, where the source has none.
        calibration_dataset: Text that static activation scales are taken from.
        calibration_batches: Batches of it.
        device: Where to compute.
    """
    cpu_runtime.install()
    from nvfp4_titan.titan.finalize import FinalizeOptions, finalize

    options = FinalizeOptions(
        quantize,
        dtype,
        skip,
        share_scales,
        tokenizer,
        calibration_dataset,
        calibration_batches,
        device=device,
    )
    sizes = finalize(source, output, options)
    print(f"{output}: {sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
