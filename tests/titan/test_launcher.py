"""Bad input ends in one line that names the fix, exit status 2, no traceback."""

import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CONFIG = os.path.join(ROOT, "train_configs", "llama3_debug.toml")


def launch(*argv, ngpu="1", config=CONFIG, cwd=None):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "nvfp4_titan.train", f"--job.config_file={config}", *argv],
        env=environment | {"NGPU": ngpu},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


CASES = {
    "unknown recipe": (["--nvfp4.recipe=nvfp5"], "use one of nvfp4, bf16"),
    "rule that matches nothing": (["--nvfp4.rules=layers.*.w9=bf16"], "matches no linear"),
    "malformed rule": (["--nvfp4.rules=layers.0"], "glob=recipe"),
    "everything filtered away": (["--nvfp4.rules=*=bf16"], "nothing to convert"),
    "backend that this machine lacks": (["--nvfp4.backend=native"], "use backend = 'reference'"),
    "folder that is not there": (["--training.dataset_path=/nowhere"], "is not there"),
    "c4_test without its folder": (["--training.dataset=c4_test"], "is not there"),
    "unknown dataset": (["--training.dataset=c5"], "use one of c4"),
    "unknown converter": (["--model.converters=nvfp5"], "use one of"),
    "unknown flavor": (["--model.flavor=9B"], "use one of debugmodel"),
    "unknown model": (["--model.name=llama9"], "is unknown"),
    "tokenizer that is not there": (["--model.hf_assets_path=/nowhere"], "is not there"),
    "reserved setting": (["--nvfp4.fp4_all_gather"], "leave it at False"),
    "not a number": (["--training.steps=1x"], "1x"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_status_two(case, tmp_path):
    argv, fragment = CASES[case]
    done = launch(*argv, cwd=tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    assert fragment in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.glob("outputs/**/run_record.json"))


def test_unknown_key(tmp_path):
    config = tmp_path / "bad.toml"
    text = open(CONFIG).read().replace('recipe = "nvfp4" ', 'recipee = "nvfp4" ')
    config.write_text(text)
    done = launch(config=str(config), cwd=tmp_path)
    assert done.returncode == 2 and "recipee" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize("content", [None, "not toml"])
def test_bad_config_file(tmp_path, content):
    config = tmp_path / "bad.toml"
    if content:
        config.write_text(content)
    done = launch(config=str(config), cwd=tmp_path)
    assert done.returncode == 2 and str(config) in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_several_workers_agree_on_the_status(tmp_path):
    done = launch("--nvfp4.recipe=nvfp5", ngpu="2", cwd=tmp_path)
    assert done.returncode == 2 and "use one of nvfp4, bf16" in done.stdout + done.stderr
    assert "NGPU" in launch(ngpu="x", cwd=tmp_path).stderr


def test_help_shows_the_docstrings(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nvfp4_titan.train", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "80"},
    )
    assert done.returncode == 0
    words = " ".join(done.stdout.replace("\u2502", " ").split())
    for fragment in ("--nvfp4.recipe", "--nvfp4.bf16-last-fraction", "The last match wins; rules"):
        assert fragment in words
