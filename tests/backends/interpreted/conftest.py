"""Triton reads TRITON_INTERPRET on import: tests/backends/test_interpreter.py runs these."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def helpers_do_not_patch_triton_again(monkeypatch):
    """The launch has patched triton.language; again at every call would be half of the time."""
    from triton.runtime.interpreter import InterpretedFunction

    patching = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        if self.fn.__module__.startswith("triton."):  # its own see another module
            return patching(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "__call__", call)
