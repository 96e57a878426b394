"""nvfp4.schedule through torchtitan's trainer: exact before the switch, and across a resume."""

import pytest
from support import logged_scalars

from nvfp4_titan.errors import ConfigError, UnsupportedError
from nvfp4_titan.scalars import VALIDATION_LOSS

DEBUG = (
    "--model.name=llama3",
    "--model.flavor=debugmodel",
    "--model.converters=nvfp4",
    "--training.dataset=stdlib",
    "--training.steps=5",
    "--lr_scheduler.warmup_steps=2",
    "--lr_scheduler.total_steps=5",
)
SCHEDULE = "--nvfp4.schedule=0.4:fprop=bf16"
CHECKPOINT = ("--checkpoint.enable", "--checkpoint.interval=1", "--checkpoint.keep_latest_k=0",
              "--checkpoint.no-last-save-model-only")  # fmt: skip

VALIDATION = (
    "--validation.enable", "--validation.dataset=stdlib_validation", "--validation.steps=2",
    "--validation.freq=1", "--validation.local_batch_size=2", "--validation.seq_len=64",
)  # fmt: skip


@pytest.mark.slow
def test_exact_before_the_switch_and_across_a_resume(train, single_rank):
    without = train(*DEBUG, folder="without")
    options = (*DEBUG, *VALIDATION, SCHEDULE, *CHECKPOINT)
    whole = train(*options, folder="whole")
    assert list(whole) == [1, 2, 3, 4, 5]
    # 0.4 of 5 steps: the first two run as without it, the third is the first to differ.
    assert [whole[step] == without[step] for step in whole] == [True, True, False, False, False]
    validated = logged_scalars(single_rank / "whole", VALIDATION_LOSS)
    checkpoints = single_rank / "whole" / "checkpoint"
    for restored in (1, 2, 4):  # before the switch, at it, and after it
        target = single_rank / f"resumed{restored}" / "checkpoint"
        target.mkdir(parents=True)
        (checkpoints / f"step-{restored}").rename(target / f"step-{restored}")
        resumed = train(*options, folder=f"resumed{restored}")
        assert resumed == {step: whole[step] for step in range(restored + 1, 6)}
        # The checkpoint's own step is validated again, in the formats that it had.
        losses = logged_scalars(single_rank / f"resumed{restored}", VALIDATION_LOSS)
        assert losses == {step: validated[step] for step in range(restored, 6)}


@pytest.mark.slow
def test_validation_in_another_recipe(train, single_rank):
    # Without learning all runs validate the same weights.
    options = (*DEBUG, *VALIDATION, "--training.steps=2", "--optimizer.lr=0")
    variants = {
        "nvfp4": [],
        "as_bf16": ["--nvfp4.validation_recipe=bf16"],
        "bf16": ["--nvfp4.recipe=bf16"],
    }
    trained = {name: train(*options, *more, folder=name) for name, more in variants.items()}
    losses = {name: logged_scalars(single_rank / name, VALIDATION_LOSS) for name in variants}
    assert list(losses["bf16"]) == [1, 2] and losses["as_bf16"] == losses["bf16"]
    assert losses["nvfp4"] != losses["bf16"]
    # The step after the first validation is as it would be without one.
    assert trained["as_bf16"] == trained["nvfp4"] != trained["bf16"]


@pytest.mark.parametrize(
    "options",
    [
        [SCHEDULE],
        ["--nvfp4.numerics_log_freq=1"],
        ["--nvfp4.validation_recipe=bf16", "--validation.enable"],
    ],
)
def test_a_trainer_that_does_not_know_the_step_is_refused(options, single_rank):
    from torchtitan.config import ConfigManager
    from torchtitan.train import Trainer

    argv = [*DEBUG, *options, "--job.custom_config_module=nvfp4_titan.titan.job_config"]
    config = ConfigManager().parse_args([*argv, f"--job.dump_folder={single_rank}"])
    with pytest.raises(UnsupportedError, match="-m nvfp4_titan.train"):
        Trainer(config)


@pytest.mark.parametrize(
    ("option", "fragment"),
    [
        ("--nvfp4.schedule=0.5:fprop", "of the form"),
        ("--nvfp4.schedule=5:fprop=bf16", "never reached"),
        ("--nvfp4.recipe=bf16", "schedule has nothing to change"),
        ("--nvfp4.validation_recipe=bf16", "nothing is validated"),
        ("--nvfp4.validation_recipe=fp9", "use one of nvfp4"),
        ("--nvfp4.fp4_all_gather", "cannot follow nvfp4.schedule"),
    ],
)
def test_checked_before_anything_starts(option, fragment, tmp_path, monkeypatch):
    from nvfp4_titan.titan.trainer import preflight

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=fragment):
        preflight([*DEBUG, SCHEDULE, option], 1)
