"""Fault injection, for `--experimental.custom_import nvfp4_titan.titan.fail_at`.

FAIL_AT is "signal,step,step,..." or "raise,step,...": what happens to rank 1 at the start of the
n-th of these steps, in the n-th start of the job (later starts are left alone): it gets SIGKILL, or
raises RuntimeError("injected").
"""

import os
import signal

from torchtitan.train import Trainer

INJECTED = "injected"

_train_step = Trainer.train_step
_how, *_steps = os.environ["FAIL_AT"].split(",")
_start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _failing(self, data_iterator):
    if os.environ["RANK"] == "1" and _start < len(_steps) and self.step == int(_steps[_start]):
        if _how == "raise":
            raise RuntimeError(INJECTED)
        os.kill(os.getpid(), signal.SIGKILL)
    _train_step(self, data_iterator)


Trainer.train_step = _failing
