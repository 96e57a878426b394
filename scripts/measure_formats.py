#!/usr/bin/env python
"""Errors of the formats on real operands: scripts/measure_formats.py with torchtitan's options.

Trains as asked, in this process, and writes format_errors.json into the dump folder:
scripts/measure_formats.py --job.config_file train_configs/llama3_debug.toml --model.converters ""
"""

import os
import sys

from nvfp4_titan.command import reporting
from nvfp4_titan.titan import cpu_runtime
from nvfp4_titan.titan.launcher import single_process_environment


@reporting
def main(argv: list[str]) -> int:
    cpu_runtime.install()
    from nvfp4_titan.titan.format_errors import MeasuringTrainer
    from nvfp4_titan.titan.trainer import run

    os.environ |= single_process_environment()
    run(argv, MeasuringTrainer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
