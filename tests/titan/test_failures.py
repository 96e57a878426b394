"""Jobs of several processes that fail, restart, and span nodes (two agents on this host)."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import free_port, spawn, train_on_ranks
from support import logged_losses, processes_naming

from nvfp4_titan.titan.checkpoints import newest_whole_step
from nvfp4_titan.titan.stopping import StopRequest

ROOT = Path(__file__).parents[2]
OPTIONS = (
    f"--job.config_file={ROOT}/train_configs/llama3_debug.toml",
    "--training.steps=8",
    "--training.seq_len=64",
    "--training.local_batch_size=2",
    "--validation.no-enable",
    "--debug.deterministic",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
)
KILLED_AT = (2, 5, 8)
OUTPUT = {
    "stdout": subprocess.PIPE,
    "stderr": subprocess.STDOUT,
    "text": True,
    "errors": "replace",  # torchrun may cut into what one rank says with what another does
}


def environment(**extra):
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    # torchrun of this Python, also where its environment is not the active one
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return inherited | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | extra


@pytest.mark.slow
def test_a_killed_job_resumes_bit_for_bit(tmp_path):
    """Rank 1 gets SIGKILL three times, once before the first checkpoint; torchrun restarts."""
    train_on_ranks(2, [*OPTIONS, f"--job.dump_folder={tmp_path}/whole"])
    restarted = subprocess.run(
        [
            str(ROOT / "scripts" / "multinode.sh"),
            *OPTIONS,
            f"--job.dump_folder={tmp_path}/killed",
            "--experimental.custom_import=nvfp4_titan.titan.fail_at",
        ],
        env=environment(
            FAIL_AT=",".join(["signal", *map(str, KILLED_AT)]),
            NNODES="1",
            HEAD="localhost:0",
            NGPU="2",
            MAX_RESTARTS=str(len(KILLED_AT)),
            NO_VENV="1",
            LOG_RANK="0,1",
        ),
        **OUTPUT,
    )
    assert restarted.returncode == 0, restarted.stdout[-4000:]
    loaded = re.findall(r"Loading the checkpoint from \S+/step-(\d+)", restarted.stdout)
    assert set(loaded) == {"4", "6"}  # what starts three and four found; two found nothing
    whole = logged_losses(tmp_path / "whole")
    assert list(whole) == list(range(1, 9))
    assert logged_losses(tmp_path / "killed") == whole


@pytest.mark.slow
def test_nothing_hangs_when_one_rank_raises(tmp_path):
    start = time.monotonic()
    done = subprocess.run(
        [
            sys.executable, "-m", "nvfp4_titan.train", *OPTIONS,
            "--parallelism.tensor_parallel_degree=2",
            "--experimental.custom_import=nvfp4_titan.titan.fail_at",
            f"--job.dump_folder={tmp_path}",
        ],
        env=environment(NGPU="2", FAIL_AT="raise,2", LOG_RANK="0,1"),
        **OUTPUT,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert "injected" in done.stdout
    assert time.monotonic() - start < 240


@pytest.mark.slow
def test_two_nodes(tmp_path):
    """Two agents that meet at one address: FSDP over two nodes of one process each.

    The worker of one is killed: both agents restart theirs, and the job resumes. Batches come from
    a data worker: step 3 runs twice, with one loss, and the dead rank's data worker ends, too.
    """
    variables = environment(
        NNODES="2", HEAD=f"localhost:{free_port()}", NGPU="1", NO_VENV="1", LOG_RANK="0",
        MAX_RESTARTS="1", FAIL_AT="signal,4",
    )  # fmt: skip
    command = [
        str(ROOT / "scripts" / "multinode.sh"), *OPTIONS, "--training.steps=4",
        "--training.dataloader.num_workers=1",
        "--experimental.custom_import=nvfp4_titan.titan.fail_at", f"--job.dump_folder={tmp_path}",
    ]  # fmt: skip
    agents = [subprocess.Popen(command, env=variables, **OUTPUT) for _ in range(2)]
    logs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(log[-3000:] for log in logs)
    assert any("Applied FSDP" in log for log in logs)
    assert all(re.search(r"Loading the checkpoint from \S+/step-2", log) for log in logs)
    assert list(logged_losses(tmp_path)) == [1, 2, 3, 4]
    assert not processes_naming(tmp_path)


def test_multinode_says_what_is_missing():
    script = str(ROOT / "scripts" / "multinode.sh")
    variables = {"PATH": os.environ["PATH"]}
    for given, missing in (({}, "set NNODES"), ({"NNODES": "2"}, "set HEAD")):
        done = subprocess.run([script], env=variables | given, capture_output=True, text=True)
        assert done.returncode != 0 and missing in done.stderr


@pytest.mark.slow
def test_a_signal_to_the_whole_job_saves_it(tmp_path):
    """Slurm's SIGTERM reaches the data workers too, whose death would end the rank at once.

    Here both loaders' are alive: it comes during a validation.
    """
    job = subprocess.Popen(
        [sys.executable, "-m", "nvfp4_titan.train", *OPTIONS, f"--job.dump_folder={tmp_path}"]
        + ["--training.steps=9", "--checkpoint.interval=1000"]
        + ["--training.dataloader.num_workers=1", "--validation.dataloader.num_workers=1"]
        + ["--validation.enable", "--validation.freq=3", "--validation.steps=40"]
        + ["--validation.seq_len=64"],
        env=environment(),
        start_new_session=True,
        **OUTPUT,
    )
    lines = []
    for line in job.stdout:
        lines.append(line)
        if re.search(r"step:\s+3 .*tps", line) and "validate" not in line:
            time.sleep(1)
            os.killpg(job.pid, signal.SIGTERM)
    assert job.wait(60) == 0, "".join(lines)
    (told,) = re.findall(r"Told to stop: step (\d+) is saved", "".join(lines))
    assert newest_whole_step(tmp_path / "checkpoint") == (int(told), [])
    assert not processes_naming(tmp_path)


def steps_until_told(rank, device):
    """Steps of 50 ms on one rank and 100 ms on the other, which is told after a second."""
    stop, start, asked = StopRequest(seconds=0.5), time.monotonic(), []
    with stop:
        for step in range(1, 200):
            time.sleep(0.05 * (1 + rank))
            if rank and time.monotonic() - start > 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.due(step):
                asked.append(step)
                if stop.anywhere(device, step):
                    break
    return step, asked, time.monotonic() - start


def test_ranks_ask_each_other_in_time(tmp_path):
    """However seldom steps are logged; and not at every step."""
    (step, asked, seconds), other = spawn(steps_until_told, "cpu", 2, tmp_path)
    assert (step, asked) == other[:2]
    assert 1 < seconds < 5 and len(asked) < 8 < step


LONG_DOCUMENTS = """
import sys
import time
from contextlib import nullcontext
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from nvfp4_titan.titan.stopping import StopRequest

class Documents(IterableDataset):
    batch = 0
    def __iter__(self):
        for self.batch in range(1000):
            yield 0
    def state_dict(self):  # torchtitan's has the tokens of the document in hand
        return {"token_buffer": [self.batch + i for i in range(100000)]}
    def load_state_dict(self, state):
        pass

stop = StopRequest()
loader = StatefulDataLoader(Documents(), num_workers=1, worker_init_fn=stop.in_worker)
with stop if sys.argv[1] == "trains" else nullcontext():
    batches = iter(loader)
    next(batches)
    time.sleep(1)  # until the pipe is full
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["trains", "does not"])
def test_a_worker_with_batches_left_ends(what):
    """What it still has to send does not fit into the pipe, and nobody reads it."""
    command = [sys.executable, "-c", LONG_DOCUMENTS, what]
    subprocess.run(command, env=environment(), timeout=60, check=True)


@pytest.mark.slow
def test_a_job_that_does_not_train_ends_its_data_worker(tmp_path):
    """Saving the loader's place starts its worker."""
    done = subprocess.run(
        [sys.executable, "-m", "nvfp4_titan.train", *OPTIONS, f"--job.dump_folder={tmp_path}"]
        + ["--checkpoint.create_seed_checkpoint", "--training.dataloader.num_workers=1"],
        env=environment(),
        timeout=100,
        **OUTPUT,
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "checkpoint" / "step-0").is_dir() and not processes_naming(tmp_path)
