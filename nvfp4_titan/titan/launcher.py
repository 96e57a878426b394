"""`python -m nvfp4_titan.train`: torchtitan's trainer on any device, errors a user can act on.

Started by torchrun it is one rank. Started plainly it is the job: settings are checked, then it
runs in this process for NGPU=1 (or unset), or under torchrun's agent with NGPU workers. What the
user can mend (nvfp4_titan.errors.UserError) ends in one line and exit status 2; everything else
keeps its traceback.
"""

import os
import sys

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..command import INTERRUPTED, reporting
from ..errors import ConfigError
from . import cpu_runtime

_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@reporting  # on every rank: under torchrun another's exit may end rank 0 before it speaks
def main(argv: list[str] | None = None) -> int:
    """Train as torchtitan's command line says; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not all(name in os.environ for name in _TORCHRUN_VARIABLES):
            return _start_job(argv)
        train(argv)
    except KeyboardInterrupt:
        print(
            "interrupted: with checkpoints the same command goes on from the last", file=sys.stderr
        )
        return INTERRUPTED
    return 0


def train(argv: list[str]) -> None:
    """Run torchtitan's trainer in this process, which is one rank.

    Raises:
        UserError: a setting or a machine that cannot be used as asked.
    """
    cpu_runtime.install()
    from .trainer import run  # imports torchtitan, which must see the CPU runtime

    cpu_runtime.patch_moe()
    run(argv)


def _start_job(argv: list[str]) -> int:
    workers = _workers()
    cpu_runtime.install()
    from .trainer import preflight  # imports torchtitan, which must see the CPU runtime

    # torchtitan's dry-run modes play all ranks in one process.
    simulated = preflight(argv, workers).comm.mode != "default"
    if workers > 1 and not simulated:
        return _spawn(workers, argv)
    os.environ |= single_process_environment()
    train(argv)
    return 0


def _workers() -> int:
    text = os.environ.get("NGPU", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"NGPU={text!r} must be a positive number of processes")
    return int(text)


def single_process_environment() -> dict[str, str]:
    """What torchrun would set for a job of one process."""
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # the store takes a free one: nobody else must find it
    }


def _spawn(workers: int, argv: list[str]) -> int:
    """Run torchrun on this host; returns the exit status of the first worker that failed."""
    log_rank = os.environ.get("LOG_RANK", "0")
    options = [
        f"--nproc-per-node={workers}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        f"--local-ranks-filter={log_rank}",
        "--role=rank",
        "--tee=3",
    ]
    # Restarted workers must not meet in the store that holds the addresses of the dead.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        torchrun.main([*options, "-m", "nvfp4_titan.train", *argv])
    except ChildFailedError as failure:
        print(failure, file=sys.stderr)
        return failure.get_first_failure()[1].exitcode
    except SignalException as told:
        print(f"stopped by {told.sigval.name}", file=sys.stderr)
        return 128 + told.sigval
    return 0
