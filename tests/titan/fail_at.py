"""For `--experimental.custom_import`: a rank that dies or raises at given steps.

FAIL_AT is "signal,step,step,..." or "raise,step,...": what happens to rank 1 at the start of the
n-th of these steps, in the n-th start of the job.
"""

import os
import signal

from torchtitan.train import Trainer

_train_step = Trainer.train_step
_how, *_steps = os.environ["FAIL_AT"].split(",")
_start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _failing(self, data_iterator):
    if os.environ["RANK"] == "1" and _start < len(_steps) and self.step == int(_steps[_start]):
        if _how == "raise":
            raise RuntimeError("injected")
        os.kill(os.getpid(), signal.SIGKILL)
    _train_step(self, data_iterator)


Trainer.train_step = _failing
