"""scripts/compare_recipes.py: a tiny run per row, the table, going on after an interruption."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_jobs import script

from nvfp4_titan.convergence import Run, compare
from nvfp4_titan.convergence.archive import pack_finished
from nvfp4_titan.convergence.check import Plan
from nvfp4_titan.convergence.recipes import ROWS, _check_machine, row_options
from nvfp4_titan.convergence.variants import parse_variant
from nvfp4_titan.errors import ConfigError
from nvfp4_titan.recipe import RECIPES

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "train_configs" / "llama3_debug.toml"
TINY = [
    "--training.steps=2", "--training.seq_len=64", "--training.local_batch_size=2",
    "--validation.seq_len=64", "--validation.local_batch_size=2", "--validation.steps=1",
    "--validation.freq=2",
]  # fmt: skip


@pytest.mark.slow
def test_table_and_going_on(tmp_path, monkeypatch, capsys):
    rows = ["bf16", "fp8", "nvfp4_46"]
    argv = [str(CONFIG), f"--output={tmp_path}/result", f"--runs={tmp_path}/runs", "--rows"]
    assert script("compare_recipes").main([*argv, *rows, "--", *TINY]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["rows"]) == rows and len(result["commands"]) == 3
    losses = {name: row["validation_loss"] for name, row in result["rows"].items()}
    assert len(set(losses.values())) == 3
    for row in result["rows"].values():
        assert row["seconds_per_step"] > 0 and row["tokens_per_second"] > 0
        assert row["peak_memory_gib"] > 0 and abs(row["relative_gap"]) < 0.05
    assert result["rows"]["bf16"]["relative_gap"] == 0
    assert result["rows"]["nvfp4_46"]["flops_share"] > 0.6
    assert (tmp_path / "result.png").stat().st_size > 1000
    assert (tmp_path / "result.md").read_text() in capsys.readouterr().out
    # What has finished is not run again; a row that was cut off is, alone.
    request = tmp_path / "runs" / "fp8_seed0" / "request.json"
    content = json.loads(request.read_text())
    content.pop("finished")
    request.write_text(json.dumps(content))
    # Neither is it on a machine that took the finished ones from this.
    archive, other = tmp_path / "runs.tar.gz", tmp_path / "other"
    assert pack_finished(tmp_path / "runs", archive).endswith("bf16_seed0, nvfp4_46_seed0")
    argv[2] = f"--runs={other}"
    started = []

    def refuse(command, **kwargs):
        started.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", refuse)
    argv = [*argv[:3], f"--take={archive}", f"--pack={tmp_path / 'again.tar.gz'}", "--rows"]
    assert script("compare_recipes").main([*argv, *rows, "--", *TINY]) == 130
    assert pack_finished(tmp_path / "none", tmp_path / "x").startswith("nothing to pack")
    assert (tmp_path / "again.tar.gz").is_file()
    assert len(started) == 1 and any("float8" in option for option in started[0])


def test_rows_are_recipes_or_fp8():
    assert set(ROWS) - {"fp8"} <= set(RECIPES) and ROWS[0] == "bf16"
    assert row_options("bf16") == ["--model.converters", ""]
    assert "--nvfp4.recipe=mxfp8" in row_options("mxfp8")
    with pytest.raises(ConfigError, match="use one of nvfp4"):
        row_options("fp9")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"device": "B"}, "device A and B"),
        ({"versions": {"torch": "3"}}, "torch 2 and 3"),
        ({"cuda_graphs": True}, "CUDA graphs False and True"),
    ],
)
def test_step_times_of_two_machines_are_not_compared(change, fragment):
    record = {"device": "A", "versions": {"torch": "2"}}
    runs = [SimpleNamespace(record=r) for r in (record, record | change)]
    with pytest.raises(ConfigError, match=f"step times of nvfp4 .*{fragment}"):
        _check_machine("nvfp4", runs[1], runs[0])
    _check_machine("nvfp4", runs[0], runs[0])


def test_what_the_machine_needs_is_no_part_of_a_request(tmp_path, monkeypatch):
    job = {}
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        plan = Plan(CONFIG, tmp_path, tuple(map(parse_variant, ("bf16", "fp8"))), (0,))
        job[gpu] = plan.jobs()["fp8", 0]
    assert job[False].request() == job[True].request()
    emulate = "--quantize.linear.float8.emulate"
    assert emulate in job[False].command() and emulate not in job[True].command()


def test_a_failed_run_names_its_log(tmp_path, capsys):
    argv = [str(CONFIG), "--output=x", f"--runs={tmp_path}", "--rows", "bf16", "--"]
    assert script("compare_recipes").main([*argv, "--training.steps=0"]) == 1
    assert "bf16_seed0/log.txt" in capsys.readouterr().out
    assert "must be positive" in (tmp_path / "bf16_seed0" / "log.txt").read_text()


def test_errors_name_the_fix(tmp_path, capsys):
    (tmp_path / "bf16_seed0").mkdir()
    (tmp_path / "bf16_seed0" / "thesis.tex").write_text("")
    argv = ["--output=x", f"--runs={tmp_path}", "--rows", "bf16"]
    for config, rows, message in (
        (CONFIG, (), "use another folder"),
        (tmp_path / "no.toml", (), "is not there"),
        (CONFIG, ("fp9",), "use bf16, fp8"),
        (CONFIG, ("bf16",), "named twice"),
    ):
        assert script("compare_recipes").main([str(config), *argv, *rows]) == 2
        assert message in capsys.readouterr().err


def test_experts_that_counted_no_validation_are_left_out():
    sizes = ("seq_len", "local_batch_size", "global_batch_size", "max_norm")
    section = dict.fromkeys(("seed", "flavor", "dataset", "dataset_path", *sizes))
    section["steps"] = 2
    config = dict.fromkeys(("debug", "model", "training", "optimizer", "lr_scheduler"), section)
    record = {"corpus_sha256": {}, "tokenizer_sha256": 1, "config": config | {"validation": {}}}

    def run(*counts):
        steps = {1: 1.0, 2: 1.0}
        return Run(
            Path("x"), record, None, {"moe": list(counts)}, steps, steps, steps, steps, steps
        )

    assert "smallest_expert_share" not in compare(run(0.0, 0.0), run(0.0, 0.0))
    assert compare(run(5.0, 5.0), run(2.0, 6.0))["smallest_expert_share"] == 0.5
