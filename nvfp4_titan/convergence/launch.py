"""Jobs that survive interruptions: started through `python -m nvfp4_titan.train`, gone on with.

A job's folder holds request.json (hash of what its TOML says, options, number of processes) beside
its dump. A job that has finished with the same request is not run again, on whatever machine it
was; one that was cut off goes on from its last checkpoint, or begins anew where it has none.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError, OutOfTime
from ..toml import toml_sha256
from .runs import Run, check_settings, read_record, read_run

REQUEST, LOG = "request.json", "log.txt"
_UNFINISHED = f"{REQUEST}.unfinished"
_CHECKPOINTS = "checkpoint"
# Our own lines, and what tyro says in a box of an option that is none.
_ERROR = re.compile("^(?:error: |│ (?=Unrecognized options))(.*?)[ │]*$".encode(), re.MULTILINE)
_STEP = re.compile(rb"step:\s+(\d+)\s.*?loss:\s+(\S+)")
_POLL_SECONDS, _TAIL_BYTES = 0.2, 20_000
_GRACE_SECONDS = 120
"""How long a job that was told to stop may take to save."""


@dataclass(frozen=True)
class Job:
    """A run to make.

    Attributes:
        config: TOML of the job.
        folder: Its dump folder, of its own.
        options: torchtitan's options.
        keep_checkpoints: Whether a finished run keeps its checkpoints, of gigabytes.
        machine_options: More of them, which this machine needs.
        environment: Variables over this process's. Neither these nor the machine's options are part
            of the request: a run counts wherever it was made.
        like: Dump folder of a finished run that this one will be compared with: where its record
            shows another text or tokenizer, it is stopped at once.
    """

    config: Path
    folder: Path
    options: tuple[str, ...]
    keep_checkpoints: bool = True
    machine_options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    like: Path | None = None

    def request(self) -> dict:
        """What must agree for a finished run to count; of the TOML what it says, not how."""
        return {
            "config_sha256": toml_sha256(self.config),
            "options": list(self.options),
            "ngpu": os.environ.get("NGPU", "1"),
        }

    def command(self) -> list[str]:
        """What runs: torchrun's agent where NGPU is more than one."""
        return [
            sys.executable,
            "-m",
            "nvfp4_titan.train",
            f"--job.config_file={self.config}",
            *self.options,
            *self.machine_options,
            f"--job.dump_folder={self.folder}",
            f"--checkpoint.folder={_CHECKPOINTS}",
            "--metrics.enable_tensorboard",
            "--metrics.save_tb_folder=tb",
        ]

    def finished(self) -> bool:
        """Whether its folder holds the finished run of this very request.

        Raises:
            ConfigError: it holds another finished run, or something that is no run.
        """
        asked = self.folder / REQUEST
        if not asked.is_file():
            files = self.folder.iterdir() if self.folder.exists() else ()
            if any(file.name != _UNFINISHED for file in files):
                raise ConfigError(
                    f"{self.folder} holds something else than a run: use another folder"
                )
            return False
        content = read_request(self.folder)
        if not content.get("finished"):
            return False
        self._check_same(content, "finished")
        return True

    def _check_same(self, asked: dict, state: str) -> None:
        if differing := self.differing(asked):
            raise ConfigError(
                f"{self.folder} holds a {state} run with other {', '.join(differing)}: remove it, "
                "use another folder, or ask for the same"
            )

    def differing(self, asked: dict) -> list[str]:
        """What a request.json asks for that this job does not; options may come in any order."""
        request = self.request()
        parts = {"config_sha256": "contents of the TOML", "ngpu": "NGPU"}
        found = [what for key, what in parts.items() if asked.get(key) != request[key]]
        given, own = settings(asked.get("options", ())), settings(self.options)
        # How often and where a run was saved is nothing of what came of it.
        names = {**given, **own}.keys() - {"checkpoint.interval", "checkpoint.folder"}
        options = sorted(name for name in names if given.get(name) != own.get(name))
        return found + [f"--{name}" for name in options]

    def run(
        self,
        deadline: float | None = None,
        watch: Callable[[int, str], None] = lambda step, loss: None,
    ) -> Run:
        """Run the job to its end, from where it was; nothing where it has finished.

        Args:
            deadline: `time.monotonic()` at which it is told to save and stop.
            watch: Called with the last step and its loss (as printed) several times a second. What
                it raises has the job save and stop.

        Raises:
            ConfigError: the job failed, or another one's run is in its folder.
            OutOfTime: it was told to stop at the deadline.
        """
        if not self.finished():
            with _held(self.folder) as lock:
                self._prepare()
                self._execute(deadline, watch, lock)
            run = read_run(self.folder)
            if missing := run.missing_steps():
                raise ConfigError(
                    f"{self.folder} ended before step {missing[0]}, by a signal from elsewhere: "
                    "start again to go on"
                )
            _write_request(self.folder, self.request() | {"finished": True})
        else:
            run = read_run(self.folder)
        if not self.keep_checkpoints:
            shutil.rmtree(self.folder / _CHECKPOINTS, ignore_errors=True)
        return run

    def _prepare(self) -> None:
        """Keep what can be gone on with; else begin with an empty folder.

        Raises:
            ConfigError: another run could be gone on with there.
        """
        if any(self.folder.glob(f"{_CHECKPOINTS}/step-*")):
            self._check_same(read_request(self.folder), "half-finished")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_request(self.folder, self.request())

    def _execute(
        self, deadline: float | None, watch: Callable[[int, str], None], lock: int
    ) -> None:
        path = self.folder / LOG
        print(shlex.join(self.command()), flush=True)
        with path.open("ab") as log:
            begin = log.tell()
            # In a session of its own: Ctrl-C reaches it as a request to save.
            process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
                env=os.environ | self.environment,
            )
        different, compared = None, self.like is None
        try:
            while process.poll() is None:
                if deadline is not None and time.monotonic() > deadline:
                    raise OutOfTime(f"{self.folder.name} was stopped at its time limit")
                step, loss = last_step(path, begin)
                watch(step, loss)
                if step and not compared:
                    compared, different = True, self._difference()
                if different:
                    break
                time.sleep(_POLL_SECONDS)
        finally:
            _end(process)
        if different:
            # What it saved when it was stopped is nothing to go on with.
            shutil.rmtree(self.folder / _CHECKPOINTS, ignore_errors=True)
            raise ConfigError(f"{self.folder.name} was stopped at its start: {different}")
        if process.returncode:
            reason = _last_error(path, begin)
            raise ConfigError(f"the run of {self.folder.name} failed: {reason}see {path}")

    def _difference(self) -> ConfigError | None:
        """What the record of a run that has begun lacks to be compared with the one it is like."""
        folders = self.like, self.folder
        try:
            check_settings(*map(read_record, folders), *folders)
        except ConfigError as error:
            return error
        return None


@contextmanager
def _held(folder: Path) -> Iterator[int]:
    """Hold a run's folder; gives what its process must inherit, which holds it as long as it lives.

    Raises:
        ConfigError: it is held: its process may have outlived the call that started it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder} is being made by another call, or by a run that outlived its call: wait "
                "for it, or end it"
            ) from None
        yield file.fileno()


def settings(options: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What torchtitan's options set, by name: their order does not matter, the last one counts."""
    found: dict[str, tuple[str, ...]] = {}
    name = ""
    for option in options:
        if not option.startswith("--"):
            found[name] = (*found.get(name, ()), option)
            continue
        name, given, value = option.removeprefix("--").partition("=")
        section, _, key = name.replace("-", "_").rpartition(".")
        off = key.startswith("no_")
        name = f"{section}.{key.removeprefix('no_')}"
        found[name] = (value,) if given else (("off",) if off else ())
    return found


def validates(config: dict, options: Sequence[str]) -> bool:
    """Whether a job validates, by its TOML and torchtitan's options over it."""
    given = settings(options).get("validation.enable")
    return bool(config.get("validation", {}).get("enable")) if given is None else given != ("off",)


def read_request(folder: Path) -> dict:
    """What the run in a folder was asked for, and whether it finished; {} where nothing says so.

    Raises:
        ConfigError: the file that should say so is damaged.
    """
    file = folder / REQUEST
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is damaged: remove {folder} to make its run again")
    return content


def _write_request(folder: Path, request: dict) -> None:
    """Write it whole or not at all: other threads read it, and a disk may be full."""
    unfinished = folder / _UNFINISHED
    unfinished.write_text(json.dumps(request))
    unfinished.replace(folder / REQUEST)


def last_step(log: Path, begin: int = 0) -> tuple[int, str]:
    """The last step that a job's log names from a byte on, and its loss; (0, "") for none."""
    found = _STEP.findall(_tail(log, begin))
    return (int(found[-1][0]), found[-1][1].decode()) if found else (0, "")


def _last_error(log: Path, begin: int) -> str:
    """The last line of ours that says what was wrong, from a byte on; "" for none."""
    found = _ERROR.findall(_tail(log, begin))
    return f"{found[-1].decode(errors='replace').strip()}; " if found else ""


def _tail(log: Path, begin: int) -> bytes:
    with log.open("rb") as lines:
        lines.seek(max(begin, log.stat().st_size - _TAIL_BYTES))
        return lines.read()


def _end(process: subprocess.Popen) -> None:
    """Have a process save and end; its whole session, if it does not."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
