"""Jobs side by side: slots, one per GPU or share of one, that take the next job when they are free.

A slot is a thread that waits for its job's process. The main thread shows where the slots are, and
gets the signals. On Ctrl-C, SIGTERM or an error all jobs in flight save and stop before it goes on;
until then signals are only noted. A KeyboardInterrupt between the threads' locks could leave one
taken, and a second one (`timeout` sends SIGTERM twice) jobs that nobody stops.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock

from ..errors import ConfigError, OutOfTime
from .launch import Job
from .progress import Progress
from .runs import Run

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_PROBE = "import sys, torch; sys.exit(not torch.cuda.is_available())"
_WATCH_SECONDS = 0.5
_LEAST_SECONDS = 60
"""A job is not started with less time left: it would do nothing but start."""


@dataclass(frozen=True)
class Slots:
    """Where jobs run.

    Attributes:
        gpus: Ids as CUDA_VISIBLE_DEVICES takes them, one each; none: one job after another, on what
            this process sees.
        per_gpu: Jobs that share a GPU.
    """

    gpus: tuple[str, ...] = ()
    per_gpu: int = 1

    def __post_init__(self):
        if self.per_gpu < 1:
            raise ConfigError(f"--per-gpu {self.per_gpu}: give 1 or more runs per GPU")
        if self.per_gpu > 1 and not self.gpus:
            raise ConfigError(f"--per-gpu {self.per_gpu} without GPUs: name them with --gpus")
        if bad := [gpu for gpu in self.gpus if not gpu or "," in gpu]:
            raise ConfigError(f"--gpus {' '.join(bad)!r}: give one id per GPU, as in --gpus 0 1")
        if len(set(self.gpus)) < len(self.gpus):
            raise ConfigError(
                f"--gpus {' '.join(self.gpus)} names a GPU twice: for several runs on a GPU use "
                "scripts/check_convergence.py with --per-gpu"
            )
        if self.gpus and (workers := os.environ.get("NGPU", "1")) != "1":
            raise ConfigError(
                f"NGPU={workers} with --gpus, where a run has one GPU: unset NGPU, or leave out "
                "--gpus for one run after another"
            )

    def environments(self) -> list[dict[str, str]]:
        """Variables of each slot's jobs; every GPU comes once before its second share.

        To and fro: variants alternate among jobs, and a GPU would get the same one every time.
        """
        rounds = [self.gpus[:: -1 if share % 2 else 1] for share in range(self.per_gpu)]
        return [{_VISIBLE: gpu} for gpus in rounds for gpu in gpus] or [{}]

    def check_gpus(self) -> None:
        """Check that every GPU is there: where torch sees none, jobs would train on the CPU.

        Raises:
            ConfigError: one is not.
        """
        command = [sys.executable, "-c", _PROBE]
        probes = {
            gpu: subprocess.Popen(command, env=os.environ | {_VISIBLE: gpu}) for gpu in self.gpus
        }
        if missing := [gpu for gpu, probe in probes.items() if probe.wait()]:
            raise ConfigError(f"torch sees no GPU {', '.join(missing)}: see nvidia-smi -L for ids")


def check_time_limit(seconds: float | None) -> None:
    """Check that a time limit leaves time for anything.

    Raises:
        ConfigError: no job would start.
    """
    if seconds is not None and seconds <= _LEAST_SECONDS:
        raise ConfigError(
            f"--time-limit {seconds:g}: no run starts with {_LEAST_SECONDS} seconds left or less; "
            "give more"
        )


def run_jobs(
    jobs: Mapping[Hashable, Job],
    slots: Slots,
    deadline: float | None,
    progress: Progress,
    ended: Callable[[], object] = lambda: None,
) -> dict[Hashable, Run | ConfigError]:
    """Run jobs in the slots, the first jobs first. A failure does not stop the others.

    To be called in the main thread, which handles signals.

    Args:
        jobs: By key; none has finished.
        slots: Where.
        deadline: `time.monotonic()` at which those in flight save and stop.
        progress: Told where they are.
        ended: Called, in the main thread, when jobs have ended while others are in flight.

    Returns:
        What came of each job, by key; jobs that the deadline left unfinished are not in it.

    Raises:
        ConfigError: a GPU is not there.
        KeyboardInterrupt: SIGINT or SIGTERM came, and all jobs in flight have stopped.
    """
    slots.check_gpus()
    work, environments = _Work(jobs, deadline, progress), slots.environments()
    with work.stopped_by_signals(), ThreadPoolExecutor(len(environments)) as threads:
        try:
            # The first jobs are dealt here, as threads start in any order.
            working = [threads.submit(work.go_on, each, work.take()) for each in environments]
            work.look_after(working, ended)
        finally:
            work.stopping = True
    if work.interrupted:
        raise KeyboardInterrupt
    return work.outcomes


def attempt(
    job: Job,
    deadline: float | None = None,
    watch: Callable[[int, str], None] = lambda step, loss: None,
) -> Run | ConfigError:
    """Run a job as `Job.run` does; what makes it fail is printed and returned."""
    try:
        return job.run(deadline, watch)
    except ConfigError as error:
        print(f"error: {error}", flush=True)
        return error


class _Stopped(Exception):
    """The slots were told to stop."""


class _Work:
    """Jobs that slots share, and what came of them."""

    def __init__(self, jobs: Mapping[Hashable, Job], deadline: float | None, progress: Progress):
        self._waiting, self._lock = iter(jobs.items()), Lock()
        self._deadline, self._progress = deadline, progress
        self.outcomes: dict[Hashable, Run | ConfigError] = {}
        self.stopping = self.interrupted = False

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Have SIGINT and SIGTERM stop the slots, and do nothing else."""

        def note(number, frame):
            self.stopping = self.interrupted = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def look_after(self, working: list[Future], ended: Callable[[], object]) -> None:
        """Wait for the slots' threads, and show where they are; raises what is no job's failure."""
        pending, told = set(working), 0
        while pending:
            done, pending = wait(pending, _WATCH_SECONDS, FIRST_COMPLETED)
            for slot in done:
                slot.result()
            if self.stopping:
                continue
            self._progress.show()
            if told < (count := len(self.outcomes)):
                told = count
                ended()

    def take(self) -> tuple[Hashable, Job] | None:
        """The next job; None where there is none, or no time for it."""
        late = self._deadline is not None and self._deadline - time.monotonic() < _LEAST_SECONDS
        with self._lock:
            return None if late or self.stopping else next(self._waiting, None)

    def go_on(self, environment: dict[str, str], taken: tuple[Hashable, Job] | None) -> None:
        """A slot's thread: run the job that was taken, then those that it takes itself."""
        while taken is not None:
            key, job = taken
            self._run(key, replace(job, environment=environment))
            taken = self.take()

    def _run(self, key: Hashable, job: Job) -> None:
        name = job.folder.name

        def watch(step: int, loss: str) -> None:
            if self.stopping:
                raise _Stopped(f"{name} was stopped")
            self._progress.step(name, step, loss)

        self._progress.begin(name)
        try:
            self.outcomes[key] = attempt(job, self._deadline, watch)
        except (_Stopped, OutOfTime) as reason:
            self.stopping = True
            print(reason, flush=True)
        finally:
            self._progress.end(name)
