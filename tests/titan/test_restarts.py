"""Runs that are stopped, die, or are started again: nothing is lost, and nothing said is untrue."""

import json
import os
import shutil
import signal
import time
from unittest.mock import Mock

import pytest
import torch
from support import FOUR_STEPS, logged_losses, logged_scalars
from torch.distributed.checkpoint import FileSystemWriter

from nvfp4_titan.errors import ConfigError, DivergedError
from nvfp4_titan.scalars import VALIDATION_LOSS
from nvfp4_titan.titan import corpus, record
from nvfp4_titan.titan.checkpoints import newest_whole_step
from nvfp4_titan.titan.trainer import NVFP4Trainer

STEPS = (*FOUR_STEPS, "--checkpoint.interval=1000")
VALIDATION = (
    "--validation.enable",
    "--validation.dataset=stdlib_validation",
    "--validation.freq=2",
    "--validation.steps=1",
    "--validation.seq_len=64",
    "--validation.local_batch_size=1",
)


@pytest.fixture
def at_step(monkeypatch):
    """A function that has something done after a training step."""

    def install(step, act):
        train_step = NVFP4Trainer.train_step

        def acting(self, data_iterator):
            train_step(self, data_iterator)
            if self.step == step:
                act()

        monkeypatch.setattr(NVFP4Trainer, "train_step", acting)

    return install


@pytest.fixture
def slow_writer(monkeypatch):
    """Checkpoints that take two seconds to write."""
    write = FileSystemWriter.write_data

    def slow(self, *args, **kwargs):
        time.sleep(2)
        return write(self, *args, **kwargs)

    monkeypatch.setattr(FileSystemWriter, "write_data", slow)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("interval", [1000, 3])
def test_told_to_stop_an_asynchronous_save_is_waited_for(
    train, single_rank, at_step, slow_writer, interval
):
    at_step(3, terminate)
    train(*STEPS, f"--checkpoint.interval={interval}", "--checkpoint.async_mode=async")
    assert newest_whole_step(single_rank / "out" / "checkpoint") == (3, [])
    assert list(logged_losses(single_rank / "out")) == [1, 2, 3]


def test_a_training_that_diverges_keeps_what_it_was_saving(
    train, single_rank, at_step, slow_writer
):
    def diverge():
        raise DivergedError("injected")

    at_step(3, diverge)
    with pytest.raises(DivergedError, match="injected"):
        train(*STEPS, "--checkpoint.interval=2", "--checkpoint.async_mode=async")
    assert newest_whole_step(single_rank / "out" / "checkpoint") == (2, [])


def test_a_job_that_saves_nothing_is_not_told_that_it_did(train, single_rank, at_step):
    """SIGTERM keeps its usual effect."""
    train(*STEPS, "--training.steps=1", folder="source")
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        at_step(2, terminate)
        source = single_rank / "source" / "checkpoint" / "step-1"
        start = ("--checkpoint.load_only", f"--checkpoint.initial_load_path={source}")
        assert list(train(*STEPS, *start)) == [1, 2, 3, 4]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came


def test_a_validation_that_the_last_step_lacks_is_made_up_for(train, single_rank, monkeypatch):
    class Died(Exception):
        pass

    whole = train(*STEPS, *VALIDATION, folder="whole")
    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr("torchtitan.components.validate.Validator.validate", dying_at(4, Died))
        train(*STEPS, *VALIDATION)
    assert 4 not in logged_scalars(single_rank / "out", VALIDATION_LOSS)
    assert train(*STEPS, *VALIDATION) == whole
    losses = [logged_scalars(single_rank / name, VALIDATION_LOSS) for name in ("out", "whole")]
    assert losses[0] == losses[1] and list(losses[0]) == [1, 2, 4]


def dying_at(last, error):
    from torchtitan.components.validate import Validator

    validate = Validator.validate

    def validating(self, model_parts, step):
        if step == last:
            raise error
        return validate(self, model_parts, step)

    return validating


def test_started_again_a_finished_run_is_as_it_was(train, single_rank):
    argv = (
        *STEPS, *VALIDATION, "--model.name=deepseek_v3", "--model.converters=nvfp4",
        "--nvfp4.numerics_log_freq=2", "--training.steps=2", "--nvfp4.backend=reference",
    )  # fmt: skip
    losses = train(*argv)
    names = ("run_record.json", "conversion.json", "numerics.json", "tokens_per_expert.json")
    before = [(single_rank / "out" / name).read_text() for name in names]
    counts = json.loads(before[-1])
    assert any(map(any, counts.values()))
    assert train(*argv) == losses
    assert [(single_rank / "out" / name).read_text() for name in names] == before


def test_a_run_resumes_on_its_own_text_alone(train, single_rank, monkeypatch):
    # Texts of a test are nothing to keep in this user's cache; its tokenizer is.
    tokenizer, cache = corpus.tokenizer_path(), single_rank / "cache" / "nvfp4_titan"
    cache.mkdir(parents=True)
    (cache / tokenizer.name).symlink_to(tokenizer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    texts = single_rank / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"m{i}.py").write_text("\n".join(f"def f{i}_{j}(): return {j}" for j in range(40)))
    argv = (*STEPS, f"--training.dataset_path={texts}")
    whole = train(*argv, folder="whole")
    train(*argv, "--training.steps=2")
    kept = json.loads((single_rank / "out" / "run_record.json").read_text())["corpora"]["training"]
    (texts / "m40.py").write_text("import os\n")
    with pytest.raises(ConfigError, match=f"no longer what .* training.dataset_path = .*{kept}"):
        train(*argv)
    # What the message says: the corpus itself, which stands for the folder that it was made from.
    moved = shutil.copytree(corpus.cache_root() / kept, single_rank / "moved")
    assert train(*argv, f"--training.dataset_path={moved}") == whole
    (moved / "train" / "state.json").unlink()
    with pytest.raises(ConfigError, match="is damaged"):
        train(*argv, f"--training.dataset_path={moved}", folder="other")


def test_a_run_resumes_with_its_own_tokenizer_alone(train, single_rank, monkeypatch):
    train(*STEPS, "--training.steps=2")
    # A start that dies on its way leaves the record of the run that it was to go on with.
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(record, "write", Mock(side_effect=MemoryError))
        train(*STEPS)
    torch.distributed.destroy_process_group()
    other = shutil.copytree(corpus.tokenizer_path(), single_rank / "tokenizer")
    file = other / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ConfigError, match=r"another tokenizer .* model\.hf_assets_path"):
        train(*STEPS, f"--model.hf_assets_path={other}")
    written = single_rank / "out" / "run_record.json"
    written.write_text(written.read_text()[:100])
    with pytest.raises(ConfigError, match=r"run_record\.json is damaged.*remove it to go on"):
        train(*STEPS)
