#!/usr/bin/env python
"""Where a step's time goes: scripts/profile_step.py TRACE [TRACE ..] --output results/name

A job with --profiling.enable_profiling --profiling.profile_freq=20 writes its traces into
DUMP_FOLDER/profile_traces/iteration_20. Prints a table, and writes OUTPUT.json.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import tyro

from nvfp4_titan.bench.profile import format_profiles, read_profile
from nvfp4_titan.command import reporting, result_file
from nvfp4_titan.errors import ConfigError


@reporting
def main(traces: tyro.conf.Positional[tuple[Path, ...]], output: Path | None = None) -> int:
    """Add up the kernels of profiled steps.

    Args:
        traces: Files that torchtitan's profiler wrote.
        output: Path of the results, without a suffix.
    """
    if not traces:
        raise ConfigError("no trace is named: give rank0_trace.json of a profiled job")
    path = None if output is None else result_file(output, ".json")
    profiles = {str(trace): read_profile(trace) for trace in traces}
    print(format_profiles(profiles))
    if path is not None:
        content = {name: asdict(profile) for name, profile in profiles.items()}
        path.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
