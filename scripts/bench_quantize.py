#!/usr/bin/env python
"""Bandwidth of the Triton backend's quantize and amax kernels, as a share of a copy.

    scripts/bench_quantize.py --output docs/results/bench_quantize

Writes OUTPUT.json (a list of rows) and OUTPUT.png. Medians, CUDA graphs, variants in random order.
"""

import sys
from pathlib import Path

import tyro

from nvfp4_titan.bench import Environment, print_table, require_gpu, write
from nvfp4_titan.command import reporting


@reporting
def main(output: Path = Path("outputs/bench_quantize"), modelopt: bool = True) -> int:
    """Measure on the current GPU.

    Args:
        output: Path of the results, without a suffix.
        modelopt: Compare with ModelOpt's fake-quant kernel too (nvidia-modelopt 0.47).
    """
    require_gpu()
    from nvfp4_titan.bench.kernels import bench_quantize  # imports Triton

    rows = bench_quantize(modelopt)
    print_table(rows)
    title = sys.modules["__main__"].__doc__.splitlines()[0]
    write(rows, output, "ratio_to_copy", title, Environment.current())
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
