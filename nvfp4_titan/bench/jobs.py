"""Lists of torchtitan jobs on one machine: each run by torchrun, timed out, recorded if it fails.

A job that fails, hangs or does not fit the time left is recorded with its reason and the next one
starts. What a job left in its dump folder (losses, throughput, memory) is read in every case.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from ..errors import ConfigError
from ..scalars import (
    ACTIVE_GIB,
    RECORD,
    RESERVED_GIB,
    TOKENS_PER_SECOND,
    TRAIN_LOSS,
    read_scalars,
)
from .training import check_new

GRACE_SECONDS = 40
"""torchrun gives its workers 30 seconds between SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class Job:
    """One torchtitan job.

    Attributes:
        name: Name in the results, and of its dump folder.
        config: TOML.
        processes: Ranks, one per GPU.
        options: torchtitan's, over the TOML.
        group: Jobs that are drawn together.
        environment: Variables over this process's.
        must_fail_with: What its log says if it failed as it should; None if it should not.
        needs: Name of the job that makes what it starts from.
    """

    name: str
    config: Path
    processes: int
    options: tuple[str, ...] = ()
    group: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    must_fail_with: str | None = None
    needs: str | None = None

    def command(self, folder: Path) -> list[str]:
        """Its command line, without the Python executable."""
        return [
            *("-m", "torch.distributed.run", "--nproc-per-node", str(self.processes)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *("-m", "nvfp4_titan.train", "--job.config_file", os.path.relpath(self.config)),
            *(f"--job.dump_folder={folder}", "--metrics.log_freq=1", *self.options),
        ]


def select(jobs: list[Job], parts: Iterable[str]) -> list[Job]:
    """The jobs with one of some parts in their names, and what they need; all for no parts.

    Raises:
        ConfigError: no name has any of them.
    """
    parts = tuple(parts)
    chosen = [job for job in jobs if not parts or any(part in job.name for part in parts)]
    if not chosen:
        raise ConfigError(f"no job has one of {parts} in its name: {[job.name for job in jobs]}")
    names = {job.name for job in chosen} | {job.needs for job in chosen}
    return [job for job in jobs if job.name in names]


def run_jobs(
    jobs: Iterable[Job], folder: Path, timeout: float, budget: float
) -> Iterator[tuple[str, dict]]:
    """Run jobs one after another.

    Args:
        jobs: With names that differ.
        folder: New folder for the jobs' dump folders.
        timeout: Seconds after which a job is stopped.
        budget: Seconds for all: a job gets what is left at most, and none starts without time.

    Yields:
        Name and result: status ("ok", "failed", "timed out" or "not started"), seconds, command;
        where it got so far, losses by step, tokens_per_s of a GPU, peak_gib (reserved by the
        allocator), active_gib (of it in use), device, versions and commit;
        the end of its log where it did not end as it should.

    Raises:
        ConfigError: the folder holds runs already.
    """
    check_new(folder)
    end = time.monotonic() + budget
    for job in jobs:
        left = end - time.monotonic()
        dump = folder / job.name.replace(" ", "_").replace("=", "")
        if left < 1:
            yield job.name, {"status": "not started", "seconds": 0.0}
        else:
            yield job.name, _run(job, dump, min(timeout, left))


def _run(job: Job, folder: Path, timeout: float) -> dict:
    command = job.command(folder)
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    start = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **job.environment},
        )
        try:
            returncode = process.wait(timeout)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            _stop(process)  # also where this process is stopped: nobody else would
    seconds = time.monotonic() - start
    text = log.read_text(errors="replace")
    status = _status(job, returncode, text)
    shown = [f"{name}={value}" for name, value in job.environment.items()]
    result = {
        "status": status,
        "seconds": round(seconds, 1),
        "group": job.group,
        "command": " ".join([*shown, shlex.join(["python", *command])]),
        **_measured(folder),
    }
    return result if status == "ok" else result | {"log": text.splitlines()[-60:]}


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _status(job: Job, returncode: int | None, log: str) -> str:
    if returncode is None:
        return "timed out"
    if job.must_fail_with is None:
        return "ok" if returncode == 0 else "failed"
    return "ok" if returncode != 0 and job.must_fail_with in log else "failed"


def _measured(folder: Path) -> dict:
    """What a job that trained left in its dump folder."""
    found = {}
    record = folder / RECORD
    if record.is_file():
        content = json.loads(record.read_text())
        found |= {name: content[name] for name in ("device", "python", "versions", "commit")}
    begun = any(folder.glob("tb/*/events.out.tfevents.*"))
    recorded = read_scalars(folder) if begun else {}
    if recorded.keys() >= {TRAIN_LOSS, TOKENS_PER_SECOND, RESERVED_GIB, ACTIVE_GIB}:
        speeds = list(recorded[TOKENS_PER_SECOND].values())
        found |= {
            "losses": recorded[TRAIN_LOSS],
            "tokens_per_s": median(speeds[min(10, len(speeds) // 2) :]),
            "peak_gib": max(recorded[RESERVED_GIB].values()),
            "active_gib": max(recorded[ACTIVE_GIB].values()),
        }
    return found
