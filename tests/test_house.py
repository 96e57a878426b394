"""The house rules that no linter checks."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "module",
    [
        "nvfp4_titan",
        "nvfp4_titan.numerics",
        "nvfp4_titan.backends",
        "nvfp4_titan.training",
        "nvfp4_titan.titan",
        "nvfp4_titan.titan.launcher",
    ],
)
def test_torchtitan_is_not_imported(module):
    program = f"import sys, {module}; sys.exit('torchtitan' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_files_stay_short():
    sizes = {p: len(p.read_text().splitlines()) for p in ROOT.glob("nvfp4_titan/**/*.py")}
    assert sizes and not {p: size for p, size in sizes.items() if size > 500}
