"""A checkpoint folder appears complete or not at all, on a disk that is really full too."""

import resource
import signal
from contextlib import contextmanager

import pytest
import torch

from nvfp4_titan.deploy.writer import CheckpointWriter
from nvfp4_titan.errors import ConfigError

SIZE = 4096


@contextmanager
def files_of_at_most(size: int):
    """The system refuses to write more into a file, as it does where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def write(target, tensors=4, **options):
    with CheckpointWriter(target, **options) as writer:
        for i in range(tensors):
            writer.add(f"w{i}", torch.full((SIZE,), float(i)))
        writer.write_text("config.json", "{}" * 4)
    return writer


@pytest.mark.parametrize("shard_bytes", [4 * SIZE, 2**30], ids=["within", "at the end"])
@pytest.mark.parametrize("binary", [False, True])
def test_a_full_disk_leaves_nothing(binary, shard_bytes, tmp_path):
    with files_of_at_most(2 * SIZE), pytest.raises(ConfigError, match="free some space"):
        write(tmp_path / "out", binary=binary, shard_bytes=shard_bytes)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "out", binary=binary, shard_bytes=shard_bytes)
    assert (tmp_path / "out" / "config.json").is_file()


def test_others_may_read_a_checkpoint(tmp_path):
    """It is written in a temporary folder, which nobody else may enter, as its weights are."""
    write(tmp_path / "whole")
    assert (tmp_path / "whole").stat().st_mode & 0o777 == 0o755
    files = list((tmp_path / "whole").iterdir())
    assert len(files) > 1 and all(file.stat().st_mode & 0o444 == 0o444 for file in files)


def test_an_error_within_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), CheckpointWriter(tmp_path / "out") as writer:
        writer.add("w", torch.zeros(4))
        raise KeyError("ours")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="exists: give a folder that does not"):
        write(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be written"):
        write(tmp_path / "file" / "out")
