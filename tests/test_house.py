"""The house rules that no linter checks."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIGHT = [
    "nvfp4_titan",
    "nvfp4_titan.numerics",
    "nvfp4_titan.backends",
    "nvfp4_titan.training",
    "nvfp4_titan.deploy",
    "nvfp4_titan.convergence",
    "nvfp4_titan.bench",
    "nvfp4_titan.titan",
    "nvfp4_titan.titan.launcher",
]


def test_torchtitan_is_not_imported():
    program = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module(name)
    assert "torchtitan" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_stay_short():
    sizes = {p: len(p.read_text().splitlines()) for p in ROOT.glob("nvfp4_titan/**/*.py")}
    assert sizes and not {p: size for p, size in sizes.items() if size > 500}
