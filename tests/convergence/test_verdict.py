"""The verdict on made-up curves: gaps, noise, spikes, and what must be an error."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvfp4_titan.convergence.check import Found, Plan
from nvfp4_titan.convergence.report import _validated, switches
from nvfp4_titan.convergence.runs import Run
from nvfp4_titan.convergence.variants import ABLATIONS, parse_variant
from nvfp4_titan.convergence.verdict import (
    Thresholds,
    Verdict,
    final_loss,
    judge,
    noise,
    t_quantile,
)
from nvfp4_titan.errors import ConfigError

STEPS, EVERY, VALIDATED = 1000, 10, 50
LIMITS = Thresholds()


def made(seed=0, gap=0.0, train=lambda step: 1.0, **changes):
    """A run whose validation loss is a curve times 1 + gap, and train loss that times train."""
    logged = [1, *range(EVERY, STEPS + 1, EVERY)]
    own = 1 + 0.002 * seed

    def curve(step):
        return own * (2 + 6 / math.sqrt(step))

    generator = torch.Generator().manual_seed(7)
    batch = 1 + 0.1 * torch.rand(STEPS + 1, generator=generator)  # its difficulty, shared by all
    config = {
        "debug": {"seed": seed},
        "model": {"flavor": "x"},
        "metrics": {"log_freq": EVERY},
        "training": {
            "dataset": "d", "dataset_path": None, "seq_len": 8, "local_batch_size": 1,
            "global_batch_size": -1, "steps": STEPS, "max_norm": 1.0,
        },
        "optimizer": {}, "lr_scheduler": {}, "validation": {},
    }  # fmt: skip
    record = {
        "config": config, "corpus_sha256": {"training": "c"}, "tokenizer_sha256": "t",
        "initial_weights": 1.0 + seed,
    }  # fmt: skip
    run = Run(
        Path(f"run{seed}_{gap}"),
        record,
        None,
        None,
        {step: curve(step) * (1 + gap) * float(batch[step]) * train(step) for step in logged},
        {s: curve(s) * (1 + gap) for s in (1, *range(VALIDATED, STEPS + 1, VALIDATED))},
        {}, {}, {},
        {step: float(step % 97) for step in logged},
        {step: 8.0 * step for step in logged},
    )  # fmt: skip
    return replace(run, **changes)


CONTROL = {seed: made(seed) for seed in range(3)}


def verdict_of(gaps, limits=LIMITS, **options):
    runs = {seed: made(seed, gap, **options) for seed, gap in enumerate(gaps)}
    return judge(CONTROL, runs, limits)


@pytest.mark.parametrize(
    ("gaps", "outcome"),
    [
        ([0.004, 0.005, 0.006], "pass"),
        ([-0.02, -0.021, -0.022], "pass"),
        ([0.012, 0.013, 0.014], "fail"),
        ([0.002, 0.009, 0.016], "unclear"),
        ([0.0099], "pass"),
        ([0.0101], "fail"),
    ],
)
def test_outcomes(gaps, outcome):
    verdict = verdict_of(gaps)
    assert verdict.outcome == outcome
    assert verdict.gap == pytest.approx(sum(gaps) / len(gaps))
    assert (verdict.interval is None) == (len(gaps) == 1)
    assert verdict.spikes == dict.fromkeys(range(len(gaps)), [])
    assert set(verdict.course) == set(CONTROL[0].validation)


def test_interval_and_noise():
    # scipy.stats.t.ppf
    for probability, freedom, expected in (
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.95, 9, 1.8331),
    ):
        assert t_quantile(probability, freedom) == pytest.approx(expected, abs=1e-4)
    low, high = verdict_of([0.004, 0.005, 0.006]).interval
    half = 4.3027 * 0.001 / math.sqrt(3)
    assert (low, high) == (
        pytest.approx(0.005 - half, abs=1e-6),
        pytest.approx(0.005 + half, abs=1e-6),
    )
    assert noise(CONTROL, 0.1) == pytest.approx(0.002 / 1.002, rel=1e-6)
    assert noise({0: CONTROL[0]}, 0.1) is None
    last = [CONTROL[0].validation[step] for step in (900, 950, 1000)]
    assert final_loss(CONTROL[0], 0.1) == pytest.approx(sum(last) / 3)


def test_a_spike_is_found_and_batches_of_all_difficulties_are_none():
    verdict = verdict_of([0.0], train=lambda step: 1.5 if step == 500 else 1.0)
    assert verdict.spikes == {0: [500]} and verdict.outcome == "pass"


def test_a_run_that_diverges_fails_whatever_its_validation():
    verdict = verdict_of([0.0], train=lambda step: 1 + max(0, step - 800) / 400)
    assert verdict.outcome == "fail" and "diverged" in " ".join(verdict.reasons)
    lasting = verdict_of([0.0], train=lambda step: 1.2)
    assert lasting.outcome == "fail"
    # Below a spike's 10%, and above what may last: 5%.
    for rise, outcome in ((0.09, "fail"), (0.05, "pass")):
        low = verdict_of([0.0], train=lambda step, rise=rise: 1 + rise * (step > 800))
        assert low.outcome == outcome and low.spikes == {0: []}


def test_another_recipe_in_validation_is_said(tmp_path):
    variants = tuple(map(parse_variant, ("bf16", "nvfp4", "mine=nvfp4")))
    (tmp_path / "job.toml").write_text("[validation]\nenable = true")
    plan = Plan(tmp_path / "job.toml", tmp_path, variants, (0,))
    found = Found({(v.name, 0): made() for v in variants})
    assert _validated(plan, found) == []
    config = found.runs["mine", 0].record["config"]
    config["nvfp4"] = {"validation_recipe": "bf16"}
    assert _validated(plan, found)[0] == "- mine: validated in bf16"


def test_ablations_are_reported():
    run = {0: made(0, 0.3)}
    assert judge(CONTROL, run, LIMITS, judged=False).outcome == "reported"


def changed(path, value):
    run = made()
    place = run.record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return run


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (changed(("corpus_sha256", "training"), "other"), "corpus_sha256 differs"),
        (changed(("corpus_sha256", "training"), None), "no hash of its corpus"),
        (changed(("tokenizer_sha256",), "other"), "tokenizer_sha256 differs"),
        (changed(("tokenizer_sha256",), None), "no hash of its tokenizer"),
        (changed(("config", "debug", "seed"), 5), "not of seed 0"),
        (changed(("config", "training", "steps"), 2000), "did not run all steps: 1010"),
        (changed(("config", "optimizer"), {"lr": 1}), "optimizer differs"),
        (changed(("initial_weights",), 1.1), "began with other weights"),
        (made(checksums={s: 1.0 for s in CONTROL[0].train}), "other tokens from step"),
        (made(checksums={}), "did not record the data"),
        (made(validation={50: 3.0}), "no validation at its last step"),
        (replace(made(), train={1: 8.0}), "did not run all steps: 10 "),
    ],
)
def test_what_does_not_compare_is_an_error(run, message):
    with pytest.raises(ConfigError, match=message):
        judge(CONTROL, {0: run}, LIMITS)


def test_a_seed_that_the_control_lacks_is_an_error():
    with pytest.raises(ConfigError, match="no run of seed 3"):
        judge(CONTROL, {3: made(3)}, LIMITS)


def test_gaps_around_a_switch(tmp_path):
    config = tmp_path / "a.toml"
    config.write_text("[validation]\nenable = true")
    variants = tuple(map(parse_variant, ("bf16", "nvfp4", "fprop_switch")))
    plan = Plan(config, tmp_path, variants, (0,))
    course = {410: 0.02, 820: 0.015, 902: 0.01, 1000: 0.005}
    verdict = Verdict("reported", (), {0: 0.005}, None, {}, course, {}, {})
    lines = switches(plan, {"nvfp4": verdict, "fprop_switch": verdict}, 1000)
    assert lines[2:] == [
        "- fprop_switch, fprop as in bf16 after step 820: +1.50% at step 820, +1.00% at step 902, "
        "+0.50% at step 1000",
        "",
    ]
    assert not switches(plan, {"nvfp4": verdict, "fprop_switch": "it failed"}, 1000)


def test_variants():
    assert parse_variant("nvfp4").label == "default"
    assert parse_variant("no_sr") is ABLATIONS["no_sr"] and ABLATIONS["no_sr"].label == "no_sr"
    own = parse_variant("mine=nvfp4 --nvfp4.bf16_first_layers=2 --nvfp4.no-sr")
    assert (own.name, own.recipe, own.ablation) == ("mine", "nvfp4", False)
    assert own.arguments()[-2:] == ["--nvfp4.bf16_first_layers=2", "--nvfp4.no-sr"]
    for wrong, message in (
        ("nvfp5", "is unknown"),
        ("x=", "not of the form"),
        ("x=y", "is unknown"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_variant(wrong)


@pytest.mark.parametrize("wrong", [{"confidence": 95}, {"confidence": 0}, {"final_fraction": 0}])
def test_thresholds_that_make_no_sense(wrong):
    with pytest.raises(ConfigError, match="must be (between|over) 0"):
        Thresholds(**wrong)
