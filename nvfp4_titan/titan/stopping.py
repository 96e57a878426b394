"""SIGTERM during training: finish the step, save, and end in good order, on all ranks alike.

Schedulers send it some time before they end a job, and so does scripts/check_convergence.py when
its time is over. Without checkpoints the signal keeps its usual effect.

A scheduler signals every process of a job. Data workers ignore it during training: torch takes a
worker's death for a failure of the rank, which still needs it for the step in hand. Before and
after, it is how Python ends them.
"""

import multiprocessing
import os
import signal

import torch
from torch import distributed


class StopRequest:
    """Notes SIGTERM while it is installed (a context manager; main thread only)."""

    def __init__(self):
        self._here = False
        # No Event: its lock could be held where the signal comes in.
        self._training = multiprocessing.RawValue("b", False)

    def __enter__(self) -> "StopRequest":
        self._before = signal.signal(signal.SIGTERM, self._note)
        self._training.value = True
        return self

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGTERM, self._before)
        self._training.value = False

    def in_worker(self, worker: int) -> None:
        """Have a data worker ignore SIGTERM during training: a `worker_init_fn`.

        Args:
            worker: Its number.
        """
        training = self._training
        # At once: an exit in good order would wait for batches to be read that nobody wants.
        signal.signal(signal.SIGTERM, lambda *_: None if training.value else os._exit(0))

    def _note(self, number, frame) -> None:
        self._here = True

    def anywhere(self, device: torch.device) -> bool:
        """Whether any rank was told to stop; all ranks call it at the same step.

        Args:
            device: Where the process group reduces.
        """
        if distributed.get_world_size() == 1:
            return self._here
        told = torch.tensor(int(self._here), device=device)
        distributed.all_reduce(told, distributed.ReduceOp.MAX)
        return bool(told)
