"""scripts/check_convergence.py on real runs of a tiny model, an injected fault among them."""

import json
import os
from pathlib import Path

import pytest
from fake_jobs import script
from tokenizers import Tokenizer, models, pre_tokenizers

from nvfp4_titan.convergence.check import Plan, read_all
from nvfp4_titan.convergence.variants import ABLATIONS, parse_variant
from nvfp4_titan.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "train_configs" / "llama3_debug.toml"
TINY = (
    "--training.steps=40", "--training.seq_len=64", "--training.local_batch_size=2",
    "--validation.seq_len=64", "--validation.local_batch_size=4", "--validation.steps=4",
    "--validation.freq=15", "--metrics.log_freq=2", "--lr_scheduler.warmup_steps=5",
)  # fmt: skip
FAULTY = "one_sided_rht=nvfp4 --experimental.custom_import=inject"


def own_text(folder: Path) -> tuple[str, ...]:
    """Options for text and a tokenizer, one token a byte, that are the same with every Python.

    The built-in text is the running Python's library: of 1,024 tokens of it that are validated on,
    some builds have a table that is like the training's, others prose that is not.
    """
    (folder / "src").mkdir()
    for name, lines in {"even": range(0, 4000, 2), "odd": range(1, 4000, 2)}.items():
        # The last digits cannot be learned: no loss comes close to zero, where gaps grow.
        text = "".join(f"x{i} = x{i % 31} + {pow(3, i, 9973)}\n" for i in lines)
        (folder / "src" / f"{name}.py").write_text(text)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return (
        f"--training.dataset_path={folder}/src",
        f"--validation.dataset_path={folder}/src",
        f"--model.hf_assets_path={folder}",
    )


class Interrupt(Exception):
    """In place of Ctrl-C, which pytest takes for itself."""


@pytest.mark.slow
def test_a_check_from_end_to_end(tmp_path, monkeypatch, capsys):
    """A run that is cut off and goes on, a sound recipe that passes, a broken one that fails."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    monkeypatch.setenv("PYTHONPATH", paths)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_options = (*TINY, *own_text(tmp_path))
    runs, output = tmp_path / "runs", tmp_path / "out" / "result"
    variants = ["bf16", "nvfp4", FAULTY]
    options = [str(CONFIG), f"--output={output}", "--seeds", "0", "--checkpoint-interval=10"]

    def check(folder, *more):
        argv = [*options, f"--runs={folder}", "--variants", *variants, *more, "--", *run_options]
        return script("check_convergence").main(argv)

    # Too little time to start anything.
    assert check(runs, "--time-limit=20") == 2 and not runs.exists()
    assert "no run starts with 60 seconds left or less" in capsys.readouterr().err
    plan = Plan(CONFIG, runs, tuple(map(parse_variant, variants)), (0,), (), run_options, 10)
    job = plan.jobs()["bf16", 0]

    def interrupt(step, loss):
        if step >= 12:
            raise Interrupt

    with pytest.raises(Interrupt):
        job.run(watch=interrupt)
    assert not job.finished()
    saved = [int(f.name.removeprefix("step-")) for f in job.folder.glob("checkpoint/step-*")]
    assert max(saved) >= 12 and len(saved) >= 2  # the signal saved its own step

    archive = tmp_path / "runs.tar.gz"
    assert check(runs, f"--pack={archive}") == 1
    log = (job.folder / "log.txt").read_text()
    assert f"Loading the checkpoint from {job.folder}/checkpoint/step-{max(saved)}" in log
    assert not (job.folder / "checkpoint").exists()
    details = json.loads((tmp_path / "out" / "result_verdict.json").read_text())
    assert not details["passed"]
    assert details["variants"]["nvfp4"]["outcome"] == "pass"
    assert details["variants"]["one_sided_rht"]["outcome"] == "fail"
    rows = json.loads(output.with_suffix(".json").read_text())
    assert [(r["recipe"], r["variant"], r["seed"]) for r in rows] == [
        ("bf16", "default", 0), ("nvfp4", "default", 0), ("nvfp4", "one_sided_rht", 0),
    ]  # fmt: skip
    for row in rows:
        assert row["steps"] == 40 and row["tokens"] == 40 * 2 * 64 and row["device"]
        assert row["model"] == "llama3_debugmodel" and 1.5 < row["validation_loss"] < 2.5
        assert row["commit"] is None or len(row["commit"].removesuffix("-dirty")) == 40
    report = output.with_suffix(".md").read_text()
    assert "NOT PASSED" in report and report in capsys.readouterr().out
    assert output.with_suffix(".png").stat().st_size > 10_000

    # Elsewhere, from the archive alone; nothing is started.
    variants.pop()
    carried = tmp_path / "carried"
    assert check(carried, f"--take={archive}") == 0
    assert check(carried, "--no-launch") == check(carried, "--no-report") == 0
    # A run that is missing, and one of other options.
    (carried / "nvfp4_seed0" / "request.json").rename(tmp_path / "request.json")
    assert check(carried, "--no-launch") == 1
    assert "error: " in output.with_suffix(".md").read_text()
    (tmp_path / "request.json").rename(carried / "nvfp4_seed0" / "request.json")
    (carried / "nvfp4_seed0").rename(carried / "mxfp8_seed0")
    variants[1] = "mxfp8"
    assert check(carried, "--no-launch") == 1
    assert "was run with other --" in output.with_suffix(".md").read_text()
    assert check(carried) == 2
    assert "run with other --nvfp4.recipe" in capsys.readouterr().err


def test_the_plan():
    variants = tuple(map(parse_variant, ["bf16", "no_rht", "nvfp4"]))
    plan = Plan(CONFIG, Path("x"), variants, (3, 4), options=("--training.steps", "7"))
    order = [("bf16", 3), ("nvfp4", 3), ("bf16", 4), ("nvfp4", 4), ("no_rht", 3)]
    assert list(plan.jobs()) == order and plan.steps() == 7
    options = plan.jobs()["no_rht", 3].options
    assert "--debug.seed=3" in options and "--nvfp4.no-rht" in options
    found = read_all(plan)
    assert set(found.errors) == set(order) and "is missing" in found.errors["bf16", 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": Path("no.toml")}, "is not there"),
        ({"variants": (ABLATIONS["no_sr"],)}, "must be the control"),
        ({"variants": ()}, "must be the control"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (1, 1)}, "named twice"),
        ({"ablation_seeds": (5,)}, "no seeds \\[5\\]"),
    ],
)
def test_plans_that_make_no_sense(changes, message):
    fields = {"config": CONFIG, "folder": Path("x"), "seeds": (0,)}
    fields["variants"] = (parse_variant("bf16"), parse_variant("nvfp4"))
    with pytest.raises(ConfigError, match=message):
        Plan(**(fields | changes))
