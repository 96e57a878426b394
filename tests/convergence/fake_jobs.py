"""Jobs that are a few lines of Python in place of a training: `use` has every Job run them."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

from nvfp4_titan.convergence import launch
from nvfp4_titan.convergence.launch import Job
from nvfp4_titan.convergence.slots import Slots

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "train_configs" / "llama3_debug.toml"

START = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
with (folder / "starts").open("a") as starts:
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), file=starts)
checkpoint = folder / "checkpoint" / "step-7"

def wait_for(done):
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)

def save(*signal):
    time.sleep(0.5)
    checkpoint.mkdir(parents=True)
    sys.exit()

def until_stopped():
    signal.signal(signal.SIGTERM, save)
    (folder / "ready").touch()
    time.sleep(60)
"""
MEET = START + 'wait_for(lambda: len(list(folder.parent.glob("*/starts"))) == {count})'
UNTIL_STOPPED = START + "checkpoint.is_dir() or until_stopped()"
FIRST_ENDS = START + 'folder.name == "bf16_seed0" or checkpoint.is_dir() or until_stopped()'


def use(program: str, replace=setattr) -> None:
    """Have jobs run a program, with their folder as its argument, and any GPU be there."""
    replace(Job, "command", lambda job: [sys.executable, "-c", program, str(job.folder)])
    replace(Slots, "check_gpus", lambda slots: None)
    read = lambda folder: SimpleNamespace(folder=folder, missing_steps=list)  # noqa: E731
    replace(launch, "read_run", read)


def starts(runs: Path) -> dict[str, list[str]]:
    """CUDA_VISIBLE_DEVICES of each start, by run."""
    return {file.parent.name: file.read_text().split() for file in runs.glob("*/starts")}


def script(name: str):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # tyro reads the help out of the source
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    use(globals()[sys.argv[1]])
    sys.exit(script("check_convergence").main(sys.argv[2:]))
