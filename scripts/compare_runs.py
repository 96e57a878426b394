#!/usr/bin/env python
"""Compare finished runs with a control: scripts/compare_runs.py CONTROL RUN --output results/name

Writes OUTPUT.json (figures, commands, device, versions) and OUTPUT.png (loss curves).
"""

import json
import sys
from pathlib import Path

import tyro

from nvfp4_titan.command import reporting
from nvfp4_titan.convergence import compare, read_run
from nvfp4_titan.convergence.results import write_results


@reporting
def main(control: tyro.conf.Positional[Path], run: tyro.conf.Positional[Path], output: Path) -> int:
    """Compare a run's dump folder with the control's.

    Args:
        control: Dump folder of the control.
        run: Dump folder of the run.
        output: Path of the results, without a suffix.
    """
    reference, other = read_run(control), read_run(run)
    figures = compare(reference, other)
    write_results(output, figures, {"control": reference, "run": other})
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
