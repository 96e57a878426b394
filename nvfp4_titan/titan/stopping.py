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
import time

import torch
from torch import distributed


class StopRequest:
    """Notes SIGTERM while it is installed (a context manager; main thread only).

    Ranks ask each other at steps that they agree on, about every `seconds`: to ask waits for the
    device, and torchrun kills ranks 30 seconds after the signal.

    Args:
        seconds: Time between two questions.
    """

    def __init__(self, seconds: float = 5.0):
        self._here = False
        self._seconds = seconds
        self._asked, self._pace, self._next = None, seconds, 0
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

    def due(self, step: int) -> bool:
        """Whether it is time to ask, the same on all ranks.

        Args:
            step: The step that was done last.
        """
        return distributed.get_world_size() == 1 or step >= self._next

    def anywhere(self, device: torch.device, step: int) -> bool:
        """Whether any rank was told to stop; all ranks call it at the same step.

        Args:
            device: Where the process group reduces.
            step: The step that was done last.
        """
        if distributed.get_world_size() == 1:
            return self._here
        answer = torch.tensor([float(self._here), self._pace], device=device)
        distributed.all_reduce(answer, distributed.ReduceOp.MAX)
        told, pace = answer.tolist()
        # The device has caught up only here: what a step takes is known for the next question.
        now = time.monotonic()
        if self._asked is not None:
            then, earlier = self._asked
            self._pace = (now - then) / max(step - earlier, 1)
        self._asked, self._next = (now, step), step + max(int(self._seconds / max(pace, 1e-3)), 1)
        return bool(told)
