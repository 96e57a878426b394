"""A job with inductor's CUDA graphs: validation, checkpoints and losses as without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import logged_scalars

TRAIN = (
    *("-m", "nvfp4_titan.train"),
    f"--job.config_file={Path(__file__).parents[2] / 'train_configs' / 'llama3_debug.toml'}",
    *("--training.dataset=stdlib", "--training.steps=6", "--training.seq_len=256"),
    *("--validation.enable", "--validation.dataset=stdlib_validation", "--validation.steps=2"),
    *("--validation.freq=2", "--validation.seq_len=256", "--validation.local_batch_size=2"),
    *("--checkpoint.enable", "--checkpoint.interval=3", "--compile.enable"),
    *("--metrics.log_freq=1", "--debug.deterministic", "--debug.seed=0"),
)
LOSSES = ("loss_metrics/global_avg_loss", "validation_metrics/loss")


def losses(folder, graphs):
    environment = {**os.environ, "TORCHINDUCTOR_CUDAGRAPHS": graphs}
    command = [sys.executable, *TRAIN, f"--job.dump_folder={folder}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return [logged_scalars(folder, name) for name in LOSSES]


@pytest.mark.gpu
def test_a_job_with_graphs_has_the_losses_of_one_without(tmp_path):
    training, validation = losses(tmp_path / "graphs", "1")
    assert json.loads((tmp_path / "graphs" / "run_record.json").read_text())["cuda_graphs"]
    assert list(training) == [1, 2, 3, 4, 5, 6] and list(validation) == [1, 2, 4, 6]
    assert [training, validation] == losses(tmp_path / "plain", "0")
