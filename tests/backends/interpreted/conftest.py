"""Triton reads TRITON_INTERPRET on import: tests/backends/test_interpreter.py runs these."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
