#!/usr/bin/env python
"""NVFP4 linears and experts, forward and backward, against bf16 and peers.

    scripts/bench_linear.py --output docs/results/bench_linear

Writes OUTPUT.json (a list of rows) and OUTPUT.png. Medians, CUDA graphs, variants in random order.
"""

import sys
from pathlib import Path

import tyro

from nvfp4_titan.bench import Environment, print_table, require_gpu, write
from nvfp4_titan.command import reporting


@reporting
def main(output: Path = Path("outputs/bench_linear"), modelopt: bool = True) -> int:
    """Measure on the current GPU.

    Args:
        output: Path of the results, without a suffix.
        modelopt: Compare with ModelOpt's fake-quant kernel too (nvidia-modelopt 0.47).
    """
    require_gpu()
    from nvfp4_titan.bench.linears import bench_linear  # imports Triton

    rows = bench_linear(modelopt)
    print_table(rows)
    title = sys.modules["__main__"].__doc__.splitlines()[0]
    write(rows, output, "ratio_to_bf16", title, Environment.current())
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
