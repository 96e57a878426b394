"""Does a variant train like its control? Gaps of validation losses, their noise, a verdict.

    final loss   mean of a run's validation losses over the last part of the training
    gap          final loss of a variant's run / that of the control's run with its seed - 1
    interval     mean of the seeds' gaps +- t * deviation / sqrt(seeds), Student's t
    noise        standard deviation of the control's final losses over seeds, relative

Seeds pair up: equal initial weights and equal tokens at every step, so that what differs between
the two runs of a pair is the variant alone. Spikes are looked for in a run's training loss relative
to the control's at the same step: they saw the same batch, whose own difficulty cancels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median, stdev

from ..errors import ConfigError
from .runs import Run, check_comparable

PASS, FAIL, UNCLEAR, REPORTED = "pass", "fail", "unclear", "reported"


@dataclass(frozen=True)
class Thresholds:
    """What decides.

    Attributes:
        gap: Largest relative gap of the final validation loss.
        confidence: Of the interval over seeds, 0 to 1.
        final_fraction: Part of the steps at the end whose validations make the final loss.
        spike: Rise of the training loss against the control's over its usual ratio: a spike.
        divergence: The same, held over the last part of the training: the run diverged.
    """

    gap: float = 0.01
    confidence: float = 0.95
    final_fraction: float = 0.1
    spike: float = 0.1
    divergence: float = 0.05

    def __post_init__(self):
        for name in ("gap", "spike", "divergence"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} {getattr(self, name):g} must be a number above 0")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence {self.confidence:g} must be between 0 and 1: try 0.95")
        if not 0 < self.final_fraction <= 1:
            raise ConfigError(f"final_fraction {self.final_fraction:g} must be over 0 and up to 1")


@dataclass(frozen=True)
class Verdict:
    """What was found of a variant.

    Attributes:
        outcome: "pass" (the whole interval is within the limit), "fail" (all of it is beyond, or
            the run diverged), "unclear" (the limit lies inside), "reported" (not judged).
        reasons: Why.
        gaps: By seed.
        interval: Bounds of the mean gap; None with one seed.
        losses: Final validation losses by seed.
        course: Mean gap over seeds by step of each validation.
        spikes: Steps with a spike, by seed.
        expert_shares: Smallest share of tokens that an expert got in the last validation, relative
            to an even split, of variant and control by seed; {} without experts.
    """

    outcome: str
    reasons: tuple[str, ...]
    gaps: dict[int, float]
    interval: tuple[float, float] | None
    losses: dict[int, float]
    course: dict[int, float]
    spikes: dict[int, list[int]]
    expert_shares: dict[int, tuple[float, float]]

    @property
    def gap(self) -> float:
        """Mean over the seeds."""
        return mean(self.gaps.values())


def check_run(run: Run) -> None:
    """Check that a run is whole and can be compared step by step.

    Raises:
        ConfigError: steps, the last validation, or the tokens' checksums are missing.
    """
    if missing := run.missing_steps():
        raise ConfigError(f"{run.folder} did not run all steps: {missing[0]} is missing")
    if run.steps not in run.validation:
        raise ConfigError(
            f"{run.folder} has no validation at its last step {run.steps}: train it with "
            "-m nvfp4_titan.train"
        )
    if run.checksums.keys() != run.train.keys():
        raise ConfigError(
            f"{run.folder} did not record the data of every logged step: train it with "
            "-m nvfp4_titan.train of this version"
        )
    if not any(run.record["corpus_sha256"].values()):
        raise ConfigError(f"{run.folder} has no hash of its corpus: use stdlib, pysource or files")
    if run.record["tokenizer_sha256"] is None:
        raise ConfigError(f"{run.folder} has no hash of its tokenizer: use a tokenizer.json")


def final_loss(run: Run, fraction: float) -> float:
    """Mean validation loss over the last fraction of the steps."""
    first = run.steps * (1 - fraction)
    return mean(loss for step, loss in run.validation.items() if step >= first)


def noise(control: dict[int, Run], fraction: float) -> float | None:
    """Relative standard deviation of the control's final losses over seeds; None of one seed."""
    losses = [final_loss(run, fraction) for run in control.values()]
    return stdev(losses) / mean(losses) if len(losses) > 1 else None


def judge(
    control: dict[int, Run], runs: dict[int, Run], limits: Thresholds, *, judged: bool = True
) -> Verdict:
    """Compare a variant's runs with the control's.

    Args:
        control: Runs by seed.
        runs: Runs by seed; the control has these seeds, too.
        limits: Thresholds.
        judged: False only reports.

    Raises:
        ConfigError: runs that are not whole, or not of the same data, weights and steps.
    """
    for seed, run in runs.items():
        if seed not in control:
            raise ConfigError(f"the control has no run of seed {seed}: run it, or drop the seed")
        if run.record["config"]["debug"]["seed"] != seed:
            raise ConfigError(f"{run.folder} is not of seed {seed}")
        check_run(control[seed])
        check_run(run)
        check_comparable(control[seed], run)
    losses = {seed: final_loss(run, limits.final_fraction) for seed, run in runs.items()}
    gaps = {
        seed: loss / final_loss(control[seed], limits.final_fraction) - 1
        for seed, loss in losses.items()
    }
    bounds = interval(list(gaps.values()), limits.confidence)
    excess = {seed: relative_rise(control[seed], run) for seed, run in runs.items()}
    spikes = {
        s: [step for step, rise in e.items() if rise > limits.spike] for s, e in excess.items()
    }
    diverged = [
        seed
        for seed, rises in excess.items()
        if mean(_tail(rises, limits.final_fraction)) > limits.divergence
    ]
    outcome, reasons = _decide(mean(gaps.values()), bounds, limits.gap)
    if diverged:
        outcome = FAIL
        reasons.append(f"diverged from the control with seed {', '.join(map(str, diverged))}")
    return Verdict(
        outcome if judged else REPORTED,
        tuple(reasons),
        gaps,
        bounds,
        losses,
        {s: mean(_gap_at(control[k], run, s) for k, run in runs.items()) for s in _common(runs)},
        spikes,
        _expert_shares(control, runs),
    )


def _decide(gap: float, bounds: tuple[float, float] | None, limit: float) -> tuple[str, list[str]]:
    low, high = bounds or (gap, gap)
    over = "" if bounds else ", of one seed"
    if high <= limit:
        where = "within" if gap >= -limit else "not above"
        return PASS, [f"gap {gap:+.2%} is {where} {limit:.2%}{over}"]
    if low > limit:
        return FAIL, [f"gap {gap:+.2%} is beyond {limit:.2%}{over}"]
    return UNCLEAR, [f"{limit:.2%} lies between {low:+.2%} and {high:+.2%}: more seeds would tell"]


def relative_rise(control: Run, run: Run) -> dict[int, float]:
    """By logged step, train loss against the control's, beyond the usual ratio of the two.

    The usual ratio is the median over a quarter of the training around the step, so that a lasting
    gap is no spike. Where the control itself spikes the rise is negative.
    """
    steps = sorted(run.train)
    ratios = [run.train[step] / control.train[step] for step in steps]
    half = max(2, len(steps) // 8)
    usual = [median(ratios[max(0, i - half) : i + half + 1]) for i in range(len(steps))]
    # A ratio that has left 1 for good is no usual one.
    usual = [min(value, 1.0 + 0.02) for value in usual]
    return {step: ratio / u - 1 for step, ratio, u in zip(steps, ratios, usual, strict=True)}


def interval(values: list[float], confidence: float) -> tuple[float, float] | None:
    """Confidence interval of the mean of normally distributed values; None of a single one."""
    if len(values) < 2:
        return None
    half = t_quantile((1 + confidence) / 2, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile above the median of Student's t with `freedom` degrees of freedom."""

    def density(angle: float) -> float:
        # t = sqrt(freedom) * tan(angle) turns the density into a power of a cosine.
        return math.cos(angle) ** (freedom - 1)

    total = _integral(density, math.pi / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if 0.5 + 0.5 * _integral(density, middle) / total < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _integral(function: Callable[[float], float], end: float, pieces: int = 400) -> float:
    """Simpson's rule from 0."""
    width = end / pieces
    inner = sum((4 if i % 2 else 2) * function(i * width) for i in range(1, pieces))
    return (function(0.0) + inner + function(end)) * width / 3


def _tail(rises: dict[int, float], fraction: float) -> list[float]:
    count = max(1, int(len(rises) * fraction))
    return [rises[step] for step in sorted(rises)[-count:]]


def _gap_at(control: Run, run: Run, step: int) -> float:
    return run.validation[step] / control.validation[step] - 1


def _common(runs: dict[int, Run]) -> list[int]:
    return sorted(set.intersection(*(set(run.validation) for run in runs.values())))


def _expert_shares(control: dict[int, Run], runs: dict[int, Run]) -> dict[int, tuple[float, float]]:
    pairs = {
        seed: (run.smallest_expert_share, control[seed].smallest_expert_share)
        for seed, run in runs.items()
    }
    return {seed: shares for seed, shares in pairs.items() if None not in shares}
