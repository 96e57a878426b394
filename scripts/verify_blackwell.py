#!/usr/bin/env python
"""Verifies the native backend on a Blackwell GPU and prints a report to paste into an issue.

    scripts/verify_blackwell.py

Without such a GPU the stand-ins run: that shows what will be checked, nothing about the hardware.
Exit status: 0 if every check passed, else 1.
"""

import sys
from pathlib import Path

import tyro

from nvfp4_titan.bench.blackwell import Target, report, verify
from nvfp4_titan.version import source_commit


def main(stand_in: bool = False, output: Path | None = None) -> int:
    """Verify on the current machine.

    Args:
        stand_in: Run the stand-ins on a Blackwell GPU, too.
        output: File to write the report to as well.
    """
    target = Target.current(stand_in)
    print("Rows as they are found (minutes: kernels are compiled), then the report.", flush=True)
    checks = verify(target, announce=lambda row: print(row, flush=True))
    text = report(target, checks, source_commit() or "unknown")
    print(f"\n{text}", end="")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
    return int(any(check.passed is False for check in checks))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
