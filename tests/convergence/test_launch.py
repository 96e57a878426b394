"""What a finished run answers: the same settings, however the TOML is written."""

import json

import pytest

from nvfp4_titan.convergence.launch import REQUEST, Job, read_config
from nvfp4_titan.errors import ConfigError


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


def test_a_value_counts(job):
    job.config.write_text("[training]\nsteps = 4\nseq_len = 64\n")
    with pytest.raises(ConfigError, match="finished run with other config_sha256"):
        job.finished()


def test_what_is_no_toml(job, tmp_path):
    job.config.write_text("steps = = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_config(job.config)
    with pytest.raises(ConfigError, match="not there"):
        read_config(tmp_path / "none.toml")
