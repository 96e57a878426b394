"""Checkpoints: exact resume, half-written ones, other formats, shardings and recipes."""

import errno
import shutil

import pytest
import torch
from ranks import train_on_ranks
from safetensors.torch import load_file
from support import FOUR_STEPS, SMALL_RUN, logged_losses
from torch.distributed.checkpoint import FileSystemReader

from nvfp4_titan.errors import ConfigError
from nvfp4_titan.titan.checkpoints import newest_whole_step

NVFP4 = "--model.converters=nvfp4"


def only_first(folder, target):
    """A run that has just saved step 2."""
    (target / "checkpoint").mkdir(parents=True)
    shutil.copytree(folder / "checkpoint" / "step-2", target / "checkpoint" / "step-2")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_resume_is_exact(train, single_rank, mode):
    argv = (*FOUR_STEPS, NVFP4, f"--checkpoint.async_mode={mode}")
    whole = train(*argv, folder="whole")
    only_first(single_rank / "whole", single_rank / "resumed")
    resumed = train(*argv, folder="resumed")
    assert resumed == {step: whole[step] for step in (3, 4)}


@pytest.mark.slow
def test_high_precision_continues_in_nvfp4_and_back(train, single_rank):
    whole = {
        "": train(*FOUR_STEPS, folder="bf16"),
        NVFP4: train(*FOUR_STEPS, NVFP4, folder="nvfp4"),
    }
    for source, converter in (("bf16", NVFP4), ("nvfp4", "--model.converters=")):
        only_first(single_rank / source, single_rank / f"from_{source}")
        resumed = train(*FOUR_STEPS, converter, folder=f"from_{source}")
        assert list(resumed) == [3, 4]
        # The same weights, another arithmetic.
        other = whole["" if source == "bf16" else NVFP4]
        assert all(0 < abs(resumed[step] - other[step]) < 0.02 for step in (3, 4))


@pytest.mark.slow
def test_hugging_face_export_and_import(train, single_rank):
    train(
        *FOUR_STEPS, NVFP4, "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only",
        folder="out",
    )  # fmt: skip
    exported = single_rank / "out" / "checkpoint" / "step-4"
    weights = {}
    for file in exported.glob("*.safetensors"):
        weights |= load_file(file)
    assert "model.layers.0.self_attn.q_proj.weight" in weights
    assert all(type(w) is torch.Tensor and w.dtype == torch.float32 for w in weights.values())
    load = f"--checkpoint.initial_load_path={exported}"
    imported = train(
        *FOUR_STEPS,
        NVFP4,
        load,
        "--checkpoint.initial_load_in_hf",
        "--training.steps=1",
        folder="in",
    )
    # The weights of step 4 on the text of step 1.
    first = train(*FOUR_STEPS, NVFP4, "--training.steps=1", "--checkpoint.no-enable", folder="new")
    assert imported[1] < first[1]


@pytest.mark.slow
def test_another_sharding_continues(train, single_rank):
    """One process, then two tensor parallel ranks, then one again."""
    argv = (*FOUR_STEPS, NVFP4, "--training.steps=6", "--lr_scheduler.total_steps=6")
    whole = train(*argv, folder="whole")
    only_first(single_rank / "whole", single_rank / "sharded")
    sharded = single_rank / "sharded"
    options = [
        *SMALL_RUN, *argv, "--training.steps=4", "--parallelism.tensor_parallel_degree=2",
        f"--job.dump_folder={sharded}",
    ]  # fmt: skip
    train_on_ranks(2, options)
    middle = logged_losses(sharded)
    assert middle[3] == pytest.approx(whole[3], rel=1e-5)
    shutil.rmtree(sharded / "tb")
    end = train(*argv, folder="sharded")
    assert list(end) == [5, 6]
    assert end[5] == pytest.approx(whole[5], rel=1e-3)


@pytest.mark.slow
def test_another_number_of_data_ranks_says_what_to_leave_out(train, single_rank):
    """From one to two, and from two to one."""
    argv = (*FOUR_STEPS, NVFP4, "--training.steps=8", "--lr_scheduler.total_steps=8")
    without = "--checkpoint.exclude_from_loading=dataloader"
    train(*argv, "--training.steps=2")
    options = [*SMALL_RUN, *argv, f"--job.dump_folder={single_rank / 'out'}", "--training.steps=4"]
    with pytest.raises(Exception, match=rf"ranks \(Missing key .*dataloader.*: add {without}"):
        train_on_ranks(2, options)
    train_on_ranks(2, [*options, without])
    assert list(logged_losses(single_rank / "out")) == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match=f"another number of data-parallel ranks.*add {without}"):
        train(*argv)
    torch.distributed.destroy_process_group()
    train(*argv, without)
    assert list(logged_losses(single_rank / "out")) == list(range(1, 9))


def truncate(folder):
    for file in folder.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-1])


def test_which_checkpoints_are_whole(train, single_rank):
    train(*FOUR_STEPS, NVFP4, "--checkpoint.interval=1", "--training.steps=3", folder="out")
    folder = single_rank / "out" / "checkpoint"
    assert newest_whole_step(folder) == (3, [])
    export = folder / "step-3" / "model.safetensors.index.json"
    export.touch()  # of an end that the run went on from
    assert newest_whole_step(folder) == (3, [])
    (folder / "step-4").mkdir()
    export.rename(folder / "step-4" / export.name)
    assert "holds the model alone" in newest_whole_step(folder)[1][0]
    shutil.rmtree(folder / "step-4")
    truncate(folder / "step-3")
    step, (message,) = newest_whole_step(folder)
    assert step == 2 and "step-3 is skipped" in message and "bytes" in message
    (folder / "step-2" / ".metadata").unlink()
    assert newest_whole_step(folder)[0] == 1
    metadata = folder / "step-1" / ".metadata"
    whole = metadata.read_bytes()
    damaged = 0
    for place in range(0, len(whole), 1009):  # a bit that flipped
        metadata.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        step, messages = newest_whole_step(folder)
        assert step in (1, -1)  # and nothing is raised
        damaged += "cannot be read" in messages[-1]
    assert damaged
    metadata.write_bytes(whole[:50])
    step, messages = newest_whole_step(folder)
    assert step == -1 and len(messages) == 3
    assert newest_whole_step(folder / "nowhere") == (-1, [])
    (folder / "step-9.bak").mkdir()
    assert newest_whole_step(folder, resumable=False)[0] == -1


def test_a_file_system_that_fails_is_no_damage(tmp_path, monkeypatch):
    """Or a run would start anew beside whole checkpoints."""
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3" / ".metadata").touch()

    def stale(self):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(FileSystemReader, "read_metadata", stale)
    with pytest.raises(OSError, match="Stale"):
        newest_whole_step(tmp_path)


@pytest.mark.slow
def test_a_run_skips_what_is_not_whole(train, single_rank):
    whole = train(*FOUR_STEPS, NVFP4, folder="out")
    checkpoints = single_rank / "out" / "checkpoint"
    truncate(checkpoints / "step-4")
    shutil.rmtree(single_rank / "out" / "tb")
    assert train(*FOUR_STEPS, NVFP4, folder="out") == {step: whole[step] for step in (3, 4)}
    for step in (2, 4):
        truncate(checkpoints / f"step-{step}")
    shutil.rmtree(single_rank / "out" / "tb")
    assert train(*FOUR_STEPS, NVFP4, folder="out") == whole
    assert (single_rank / "out" / "checkpoint.incomplete-1" / "step-2").is_dir()


def test_a_checkpoint_asked_for_by_name_must_be_whole(train, single_rank):
    train(*FOUR_STEPS, NVFP4, "--training.steps=2")
    truncate(single_rank / "out" / "checkpoint" / "step-2")
    with pytest.raises(ConfigError, match="names a whole one"):
        train(*FOUR_STEPS, NVFP4, "--checkpoint.load_step=2")


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_save_that_fails_says_so(train, single_rank, mode):
    """Not that a checkpoint cannot be read; what was saved before stays whole."""
    folder = single_rank / "out" / "checkpoint"
    argv = (*FOUR_STEPS, NVFP4, "--checkpoint.interval=1", f"--checkpoint.async_mode={mode}")
    train(*argv, "--training.steps=1", "--lr_scheduler.total_steps=4")
    (folder / "step-2").touch()  # where a folder must be made
    with pytest.raises(ConfigError, match=r"cannot be saved in .*step-2.*: make room there"):
        train(*argv)
    assert newest_whole_step(folder)[0] == 1


@pytest.mark.parametrize("stray", [False, True])
def test_a_folder_without_checkpoints_does_not_hide_what_to_start_from(train, single_rank, stray):
    train(*FOUR_STEPS, NVFP4, folder="base")
    load = f"--checkpoint.initial_load_path={single_rank}/base/checkpoint/step-2"
    argv = (*FOUR_STEPS, NVFP4, load, "--training.steps=1")
    wanted = train(*argv, folder="wanted")
    folder = single_rank / "out" / "checkpoint"
    folder.mkdir(parents=True)
    if stray:
        (folder / "notes").touch()
    assert train(*argv) == wanted
