"""Triton reads TRITON_INTERPRET on import: tests/backends/test_interpreter.py runs these."""

import os
import sys

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
elif sys.platform == "linux":
    from triton.runtime.interpreter import InterpretedFunction

    patch_and_call = InterpretedFunction.__call__

    def call_from_a_kernel(self, *args, **kwargs):
        # The interpreter patches triton.language once more for every function that a kernel calls:
        # half of its time. Ours see what the kernel's own start has patched; Triton's do not.
        if self.fn.__module__.startswith("triton."):
            return patch_and_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call_from_a_kernel
