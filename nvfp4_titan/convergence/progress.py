"""Where jobs that run side by side are, and about how long all of them will take."""

import heapq
import sys
import time
from dataclasses import dataclass
from threading import Lock

_TERMINAL_SECONDS, _LOG_SECONDS = 10, 60


@dataclass
class _Running:
    step: int = 0
    loss: str = ""
    seen: float = 0.0  # when `step` was
    first: tuple[int, float] | None = None  # the first step, and when it was seen

    def pace(self) -> float | None:
        """Seconds per step, validations included; None before the second step that is seen."""
        if self.first is None or self.step == self.first[0]:
            return None
        return (self.seen - self.first[1]) / (self.step - self.first[0])


class Progress:
    """Prints a line now and then. Slots report to it from threads of their own.

    Args:
        steps: Of a run; None where they are not known.
        count: Runs to make.
    """

    def __init__(self, steps: int | None, count: int):
        self._steps, self._count, self._ended = steps, count, 0
        self._running: dict[str, _Running] = {}
        self._paces: list[float] = []  # of runs that have ended
        self._lock = Lock()
        self._every = _TERMINAL_SECONDS if sys.stdout.isatty() else _LOG_SECONDS
        self._printed = time.monotonic()

    def begin(self, name: str) -> None:
        """A run starts."""
        with self._lock:
            self._running[name] = _Running()

    def step(self, name: str, step: int, loss: str) -> None:
        """Note a run's last step and its loss; (0, "") before the first."""
        with self._lock:
            run, now = self._running[name], time.monotonic()
            if step != run.step:
                run.step, run.loss, run.seen = step, loss, now
                run.first = run.first or (step, now)

    def end(self, name: str) -> None:
        """A run has ended, whichever way."""
        with self._lock:
            if pace := self._running.pop(name).pace():
                self._paces.append(pace)
            self._ended += 1

    def show(self) -> None:
        """Print where the runs are, if it is time to."""
        now = time.monotonic()
        if now - self._printed < self._every:
            return
        self._printed = now
        if line := self.line():
            print(line, flush=True)

    def line(self) -> str:
        """Where the runs are; "" before the first step of any."""
        with self._lock:
            if not any(run.step for run in self._running.values()):
                return ""
            places = ", ".join(self._place(*item) for item in self._running.items())
            left = f"{self._count - self._ended} of {self._count} runs left{self._time()}"
            return f"{places}; {left}"

    def _place(self, name: str, run: _Running) -> str:
        if not run.step:
            return f"{name} starts"
        return f"{name} {run.step}{f'/{self._steps}' if self._steps else ''} loss {run.loss}"

    def _time(self) -> str:
        paces = [pace for run in self._running.values() if (pace := run.pace())]
        if self._steps is None or not paces + self._paces:
            return ""
        slowest = max(paces + self._paces)
        # Each waiting run goes to the slot that is free first.
        free = sorted(
            (self._steps - run.step) * (run.pace() or slowest) for run in self._running.values()
        )
        for _ in range(self._count - self._ended - len(free)):
            heapq.heapreplace(free, free[0] + self._steps * slowest)
        return f", about {clock(max(free))}"


def clock(seconds: float) -> str:
    """Minutes and seconds, such as "3m05s"."""
    return f"{int(seconds) // 60}m{int(seconds) % 60:02}s"
