"""What a finished run answers: the same settings, however the TOML is written."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nvfp4_titan.convergence.check import Plan
from nvfp4_titan.convergence.launch import REQUEST, Job
from nvfp4_titan.convergence.report import _title, passed
from nvfp4_titan.convergence.variants import parse_variant
from nvfp4_titan.convergence.verdict import REPORTED, Verdict
from nvfp4_titan.errors import ConfigError
from nvfp4_titan.toml import read_toml


@pytest.fixture
def job(tmp_path):
    """A job that has finished."""
    config, folder = tmp_path / "job.toml", tmp_path / "run"
    config.write_text("[training]\nsteps = 3\nseq_len = 64\n")
    job = Job(config, folder, ("--nvfp4.no-sr",))
    folder.mkdir()
    (folder / REQUEST).write_text(json.dumps(job.request() | {"finished": True}))
    return job


def test_comments_and_order_do_not_count(job):
    assert job.finished()
    job.config.write_text("# new\n[training]\nseq_len = 64  # tokens\nsteps = 3\n")
    assert job.finished()


def test_options_may_come_in_any_order(job):
    def with_options(*options):
        return replace(job, options=options)

    first = with_options("--training.steps=3", "--nvfp4.no-sr", "--model.converters", "")
    (job.folder / REQUEST).write_text(json.dumps(first.request() | {"finished": True}))
    same = ("--model.converters=", "--nvfp4.no_sr", "--training.steps", "3")
    assert with_options(*same).finished()
    assert with_options("--nvfp4.sr", *same).finished()  # the last one counts
    for more in ("--nvfp4.sr", "--training.steps=4", "--model.converters=nvfp4", "--nvfp4.seed=1"):
        name = more.partition("=")[0]
        with pytest.raises(ConfigError, match=f"with other {name}: "):
            with_options(*same, more).finished()
    with pytest.raises(ConfigError, match=r"with other --training\.steps: "):
        with_options(*same[:2]).finished()


def test_a_value_counts(job):
    job.config.write_text("[training]\nsteps = 4\nseq_len = 64\n")
    with pytest.raises(ConfigError, match="finished run with other contents of the TOML"):
        job.finished()


def test_a_damaged_request_loses_nothing(job):
    (job.folder / "checkpoint" / "step-500").mkdir(parents=True)
    (job.folder / REQUEST).write_text('{"conf')
    with pytest.raises(ConfigError, match=f"{REQUEST} is damaged: remove"):
        job.run()
    assert (job.folder / "checkpoint" / "step-500").is_dir()


def test_another_jobs_half_finished_run_is_kept(job):
    saved = job.folder / "checkpoint" / "step-500"
    saved.mkdir(parents=True)
    (job.folder / REQUEST).write_text(json.dumps(job.request()))
    other = replace(job, options=(*job.options, "--metrics.log_freq=1"))
    with pytest.raises(ConfigError, match=r"half-finished run with other --metrics\.log_freq: "):
        other.run()
    assert saved.is_dir()


def test_checkpoints_lie_where_they_are_looked_for(job):
    job.config.write_text(job.config.read_text() + "[checkpoint]\nfolder = 'elsewhere'\n")
    assert "--checkpoint.folder=checkpoint" in job.command()


def test_a_request_that_could_not_be_written(job, monkeypatch):
    """The disk was full; with room again the run begins."""
    (job.folder / REQUEST).rename(job.folder / f"{REQUEST}.unfinished")
    assert not job.finished()
    monkeypatch.setattr(Job, "command", lambda job: [sys.executable, "-c", "1 / 0"])
    with pytest.raises(ConfigError, match="failed"):
        job.run()
    assert json.loads((job.folder / REQUEST).read_text()) == job.request()


def test_a_failure_says_why(job, monkeypatch):
    program = "import sys; print('step: 1'); sys.exit('error: rule x is wrong')"
    monkeypatch.setattr(Job, "command", lambda job: [sys.executable, "-c", program])
    (job.folder / REQUEST).unlink()
    with pytest.raises(ConfigError, match="failed: rule x is wrong; see .*log.txt"):
        job.run()


def test_an_option_that_is_none_is_named(job, monkeypatch):
    program = "print('│ Unrecognized options: --nvfp4.frst=2      │'); raise SystemExit(2)"
    monkeypatch.setattr(Job, "command", lambda job: [sys.executable, "-X", "utf8", "-c", program])
    (job.folder / REQUEST).unlink()
    with pytest.raises(ConfigError, match="failed: Unrecognized options: --nvfp4.frst=2; see "):
        job.run()


def test_how_often_a_run_was_saved_does_not_count(job):
    assert replace(job, options=(*job.options, "--checkpoint.interval=7")).finished()


def test_losses_to_compare(tmp_path):
    config = tmp_path / "job.toml"
    config.write_text("[validation]\nenable = true\n")
    bf16, nvfp4 = map(parse_variant, ("bf16", "nvfp4"))
    Plan(config, tmp_path, (bf16, nvfp4), (0,))
    with pytest.raises(ConfigError, match="have none: set validation.enable"):
        Plan(config, tmp_path, (bf16, nvfp4), (0,), options=("--validation.no-enable",))
    config.write_text("")
    with pytest.raises(ConfigError, match="have none: set validation.enable"):
        Plan(config, tmp_path, (bf16, nvfp4), (0,))
    Plan(config, tmp_path, (bf16, nvfp4), (0,), options=("--validation.enable",))


def test_ablations_alone_are_no_pass():
    reported = Verdict(REPORTED, (), {0: 0.0}, None, {0: 1.0}, {1: 0.0}, {0: []}, {})
    assert not passed({"no_sr": reported}) and not passed({})
    assert "NOTHING JUDGED" in _title({"no_sr": reported})


def test_scripts_can_be_called():
    scripts = [*Path(__file__).parents[2].glob("scripts/*.py")]
    assert scripts and all(script.stat().st_mode & 0o111 for script in scripts)


def test_what_is_no_toml(job, tmp_path):
    job.config.write_text("steps = = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(job.config)
    with pytest.raises(ConfigError, match="not there"):
        read_toml(tmp_path / "none.toml")
