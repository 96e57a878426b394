"""What a user may get wrong with the comparing scripts is found before the first run."""

import json
import os
import signal
import subprocess
import sys
import time

import fake_jobs
import pytest
from fake_jobs import CONFIG, ROOT, START, starts
from support import processes_naming

from nvfp4_titan.command import result_file
from nvfp4_titan.convergence.archive import carried
from nvfp4_titan.convergence.check import Plan, run_all
from nvfp4_titan.convergence.runs import read_run
from nvfp4_titan.convergence.slots import Slots
from nvfp4_titan.convergence.variants import parse_variant
from nvfp4_titan.convergence.verdict import Thresholds
from nvfp4_titan.errors import ConfigError
from nvfp4_titan.scalars import RECORD

PAIR = tuple(map(parse_variant, ("bf16", "nvfp4")))


@pytest.mark.parametrize("name", ["../b", "a/b", ".", ".hidden", "a b"])
def test_a_variant_names_a_folder_of_its_own(name):
    with pytest.raises(ConfigError, match="names a folder"):
        parse_variant(f"{name}=nvfp4")
    assert parse_variant("nvfp4-1.5+x=nvfp4").name == "nvfp4-1.5+x"


@pytest.mark.parametrize(
    "options",
    [
        ("--debug.seed=77",),
        ("--nvfp4.recipe", "mxfp8"),
        ("--checkpoint.interval=2",),
        ("--job.dump-folder=/tmp",),
        ("--checkpoint.no-enable",),
    ],
)
def test_what_the_check_sets_is_not_taken_after_the_dashes(options, tmp_path):
    with pytest.raises(ConfigError, match="after -- is set for each run"):
        Plan(CONFIG, tmp_path, PAIR, (0,), options=options)


@pytest.mark.parametrize("spelling", ["no-enable", "no_enable"])
def test_validation_that_is_off(spelling, tmp_path):
    with pytest.raises(ConfigError, match="have none: set validation.enable"):
        Plan(CONFIG, tmp_path, PAIR, (0,), options=(f"--validation.{spelling}",))


@pytest.mark.parametrize("name", ["gap", "spike", "divergence"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_thresholds_that_decide_nothing(name, value):
    with pytest.raises(ConfigError, match=f"{name} .* must be a number above 0"):
        Thresholds(**{name: value})


@pytest.mark.parametrize("between", ["=", " "])
def test_a_schedule_may_be_spelt_with_a_space(between):
    (change,) = parse_variant(f"sw=nvfp4 --nvfp4.schedule{between}0.5:fprop=bf16").schedule(10)
    assert change.gemm == "fprop"


@pytest.mark.parametrize("content", ["", '{"a"', "[]", '{"a": 1}'])
def test_a_damaged_record_is_named(content, tmp_path, monkeypatch):
    from nvfp4_titan.convergence import runs

    monkeypatch.setattr(runs, "read_scalars", lambda folder: {runs.TRAIN_LOSS: {}})
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(ConfigError, match=f"{RECORD} is damaged"):
        read_run(tmp_path)


def test_results_of_names_with_dots(tmp_path):
    names = {result_file(tmp_path / f"llama3.{i}", ".json").name for i in (1, 2)}
    assert names == {"llama3.1.json", "llama3.2.json"} and not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="cannot be written"):
        result_file(ROOT / "README.md" / "x", ".json")


@pytest.mark.parametrize("archive", ["README.md/runs.tar.gz", "docs"])
def test_an_archive_that_cannot_be_written_is_found_first(archive, tmp_path):
    with (
        pytest.raises(ConfigError, match="cannot be written"),
        carried(tmp_path, (), ROOT / archive),
    ):
        pytest.fail("runs would begin")


def test_a_run_is_made_by_one_call_at_a_time(tmp_path, monkeypatch):
    """By no other while the process that makes it lives, though its call was killed."""
    monkeypatch.delenv("NGPU", raising=False)
    command = [sys.executable, fake_jobs.__file__, "UNTIL_STOPPED", str(CONFIG), "--seeds", "0"]
    options = ("--variants", "bf16", "--runs", str(tmp_path), "--output", str(tmp_path / "out"))
    first = subprocess.Popen([*command, *options])
    deadline = time.monotonic() + 60
    while not (tmp_path / "bf16_seed0" / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.kill()
    first.wait()
    fake_jobs.use(START, monkeypatch.setattr)
    plan = Plan(CONFIG, tmp_path, PAIR[:1], (0,))
    errors = run_all(plan, Slots()).errors
    assert "outlived its call" in errors["bf16", 0]
    assert starts(tmp_path) == {"bf16_seed0": ["None"]}
    request = json.loads((tmp_path / "bf16_seed0" / "request.json").read_text())
    assert "finished" not in request
    (job,) = processes_naming(tmp_path / "bf16_seed0")
    os.kill(job, signal.SIGTERM)
    while run_all(plan, Slots()).errors:
        assert time.monotonic() < deadline
