"""Sharded runs through the launcher, over gloo: the same losses as one process."""

import os
import re
import subprocess
import sys

import pytest

COMMON = (
    "--model.name=llama3",
    "--model.flavor=debugmodel",
    "--model.converters=nvfp4",
    "--training.dataset=stdlib",
    "--training.local_batch_size=2",
    "--training.seq_len=64",
    "--training.mixed_precision_param=float32",
    "--lr_scheduler.warmup_steps=2",
    "--optimizer.implementation=foreach",
    "--activation_checkpoint.mode=none",
    "--metrics.log_freq=1",
    "--metrics.disable_color_printing",
    "--debug.seed=0",
    "--checkpoint.enable",
)


def launch(folder, ngpu, *argv) -> dict[int, float]:
    """Losses by step, as printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "nvfp4_titan.train", *COMMON, *argv],
        env=environment | {"NGPU": str(ngpu)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    return {
        int(step): float(loss) for step, loss in re.findall(r"step:\s+(\d+)\s+loss:\s+(\S+)", log)
    }


@pytest.mark.slow
def test_tensor_parallel_gives_one_process_losses(tmp_path):
    seed = tmp_path / "seed"
    launch(tmp_path, 1, "--checkpoint.create_seed_checkpoint", f"--job.dump_folder={seed}")
    load = f"--checkpoint.initial_load_path={seed}/checkpoint/step-0"
    steps = ("--training.steps=5", "--checkpoint.load_only")
    one = launch(tmp_path, 1, load, *steps, f"--job.dump_folder={tmp_path}/one")
    two = launch(
        tmp_path, 2, load, *steps, f"--job.dump_folder={tmp_path}/two",
        "--parallelism.tensor_parallel_degree=2",
    )  # fmt: skip
    assert list(one) == list(two) == [1, 2, 3, 4, 5]
    # What differs is the order of partial sums; printed losses have five decimals.
    assert two[1] == pytest.approx(one[1], rel=1e-5)
    assert two[5] == pytest.approx(one[5], rel=1e-3)


@pytest.mark.slow
def test_fsdp_trains(tmp_path):
    losses = launch(tmp_path, 2, "--training.steps=3", "--parallelism.data_parallel_shard_degree=2")
    assert list(losses) == [1, 2, 3] and all(6 < loss < 9 for loss in losses.values())
