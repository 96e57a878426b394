"""What is read of a run's event files."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from nvfp4_titan.errors import ConfigError
from nvfp4_titan.scalars import read_scalars


def write_events(folder, name, loss):
    writer = SummaryWriter(str(folder / "tb" / "x"))
    for step, value in loss.items():
        writer.add_scalar("loss_metrics/global_avg_loss", value, step)
        if step % 4 == 0:
            writer.add_scalar("validation_metrics/loss", value, step)
    writer.close()
    (file,) = (f for f in (folder / "tb" / "x").iterdir() if f.name.startswith("events"))
    file.rename(folder / "tb" / "x" / f"kept.{name}")


def test_later_starts_replace_what_was_lost(tmp_path):
    """Two starts: the first was killed at step 8 and went on from a checkpoint of step 4."""
    write_events(tmp_path, "a", {s: 1.0 for s in range(1, 9)})
    write_events(tmp_path, "b", {s: 2.0 for s in range(5, 7)})
    for name, seconds in (("a", 100), ("b", 200)):
        folder = tmp_path / "tb" / "x"
        (folder / f"kept.{name}").rename(folder / f"events.out.tfevents.{seconds}.host.1.0")
    scalars = read_scalars(tmp_path)
    assert scalars["loss_metrics/global_avg_loss"] == {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2}
    assert scalars["validation_metrics/loss"] == {4: 1.0}


def test_a_folder_without_event_files(tmp_path):
    with pytest.raises(ConfigError, match="holds no TensorBoard file"):
        read_scalars(tmp_path)
    write_events(tmp_path, "x", {})
    (tmp_path / "tb" / "x" / "kept.x").rename(tmp_path / "tb" / "x" / "events.out.tfevents.1.h.1.0")
    assert read_scalars(tmp_path) == {}  # it ended before its first step
