#!/usr/bin/env python
"""Memory and network traffic of a job per rank, from its TOML and the number of ranks; no GPU.

    scripts/estimate.py train_configs/llama3_8b.toml --ranks 8
    scripts/estimate.py train_configs/llama3_8b.toml --ranks 8 -- --training.seq_len=4096

Prints bf16 beside NVFP4. Options after -- are torchtitan's. docs/scale.md says what is assumed.
"""

import json
import math
import os
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

# Before torch is imported: torchtitan must take the CPU for its device.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

from nvfp4_titan.command import check_writable, reporting, split_options
from nvfp4_titan.errors import ConfigError
from nvfp4_titan.titan import cpu_runtime


@dataclass
class Arguments:
    """Estimate a job."""

    config: tyro.conf.Positional[Path]
    """TOML of the job."""
    ranks: int
    """Number of ranks, one per GPU."""
    device_gib: float = 80.0
    """Memory of a device, to compare with."""
    output: Path | None = None
    """JSON file to write, in bytes."""


@reporting
def main(argv: list[str]) -> int:
    own, options = split_options(argv)
    arguments = tyro.cli(Arguments, args=own)
    cpu_runtime.install()
    # Imports torchtitan, which must see the CPU runtime.
    from nvfp4_titan.titan.estimate import compare, format_table
    from nvfp4_titan.version import source_commit

    if arguments.output:
        check_writable(arguments.output)
    if not 0 < arguments.device_gib < math.inf:
        raise ConfigError(f"--device-gib {arguments.device_gib:g} must be a number above 0")
    found = compare(arguments.config, arguments.ranks, options)
    print(format_table(found, arguments.device_gib))
    if arguments.output:
        content = {
            "command": shlex.join(sys.argv),
            "torch": torch.__version__,
            "commit": source_commit(),
        }
        content |= {name: asdict(estimate) for name, estimate in found.items()}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
