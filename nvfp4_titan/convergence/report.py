"""A check's results as files: OUTPUT.json, OUTPUT_verdict.json, OUTPUT.png, OUTPUT.md.

OUTPUT.json is a list of runs, one flat record each; the verdict's file holds gaps, noise,
thresholds, curves, commands and versions.
"""

import json
import shlex
from dataclasses import asdict
from pathlib import Path

from ..command import markdown_table, result_file
from ..errors import ConfigError
from .check import Found, Plan, control_noise
from .plot import plot_gaps
from .runs import Run
from .variants import Variant
from .verdict import PASS, REPORTED, Thresholds, Verdict, final_loss

_ABOUT = ("device", "python", "versions", "corpus_sha256", "tokenizer_sha256")


def passed(verdicts: dict[str, Verdict | str]) -> bool:
    """Whether a variant was judged, every judged one passed, and no run is missing or broken."""
    outcomes = [v if isinstance(v, str) else v.outcome for v in verdicts.values()]
    return PASS in outcomes and all(outcome in (PASS, REPORTED) for outcome in outcomes)


def _title(verdicts: dict[str, Verdict | str]) -> str:
    if passed(verdicts):
        return "PASS"
    reported = all(isinstance(v, Verdict) and v.outcome == REPORTED for v in verdicts.values())
    return "NOTHING JUDGED" if reported else "NOT PASSED"


def run_rows(plan: Plan, found: Found, limits: Thresholds, commit: str | None) -> list[dict]:
    """One flat record per run."""
    by_name = {variant.name: variant for variant in plan.variants}
    return [
        _row(by_name[name], seed, run, limits, commit) for (name, seed), run in found.runs.items()
    ]


def _row(variant: Variant, seed: int, run: Run, limits: Thresholds, commit: str | None) -> dict:
    last = max(run.validation)
    row = {
        "model": _model(run),
        "recipe": variant.recipe,
        "variant": variant.label,
        "seed": seed,
        "steps": max(run.train),
        "tokens": round(run.tokens[max(run.tokens)]) if run.tokens else None,
        "validation_loss": run.validation[last],
        "final_loss": final_loss(run, limits.final_fraction),
        "train_loss": run.train[max(run.train)],
        "tokens_per_second": run.tokens_per_second,
        "flops_share": run.flops_share,
        "device": run.record["device"],
        "commit": run.record.get("commit") or commit,
        "options": list(variant.options),
    }
    if run.smallest_expert_share is not None:
        row["smallest_expert_share"] = run.smallest_expert_share
    return row


def _model(run: Run) -> str:
    model = run.record["config"]["model"]
    return f"{model['name']}_{model['flavor']}"


def markdown(
    plan: Plan,
    found: Found,
    verdicts: dict[str, Verdict | str],
    spread: float | None,
    limits: Thresholds,
) -> str:
    """The report, a table in its middle."""
    if not found.runs:
        return "No run has finished.\n"
    run = next(iter(found.runs.values()))
    config, control = run.record["config"], plan.variants[0]
    tokens = f"{round(max(run.tokens.values())):,} tokens" if run.tokens else "tokens not recorded"
    losses = {seed: final_loss(r, limits.final_fraction) for seed, r in found.of(control).items()}
    lines = [
        f"# Convergence of {_model(run)}: {_title(verdicts)}",
        "",
        f"{config['training']['dataset']}, {run.steps} steps, {tokens} a run, on "
        f"{run.record['device']}. Gap: relative difference of the validation loss (mean over the "
        f"last {limits.final_fraction:.0%} of the steps) to {control.name}'s run of the same seed, "
        "which saw the same tokens from the same weights.",
        "",
        f"{control.name}: {_losses(losses)}; spread over seeds "
        + (
            f"{spread:.2%} (standard deviation)." if spread is not None else "not known (one seed)."
        ),
        "",
    ]
    interval = f"{limits.confidence:.0%} interval"
    head = ("variant", "seeds", "loss", "gap", interval, "gaps by seed", "spikes", "verdict")
    lines += markdown_table(head, [_verdict_row(name, v) for name, v in verdicts.items()])
    lines += ["", *_courses(verdicts), *switches(plan, verdicts, run.steps)]
    lines += [*_validated(plan, found), *_experts(verdicts)]
    return "\n".join(lines).rstrip() + "\n"


def _verdict_row(name: str, verdict: Verdict | str) -> tuple[object, ...]:
    if isinstance(verdict, str):
        return (name, *[""] * 6, f"error: {verdict}")
    return (
        name,
        len(verdict.gaps),
        _losses(verdict.losses),
        f"{verdict.gap:+.2%}",
        "" if verdict.interval is None else "{:+.2%} to {:+.2%}".format(*verdict.interval),
        " ".join(f"{gap:+.2%}" for gap in verdict.gaps.values()),
        sum(map(len, verdict.spikes.values())),
        f"{verdict.outcome}: {'; '.join(verdict.reasons)}",
    )


def _validated(plan: Plan, found: Found) -> list[str]:
    """Which variants' losses are not those of the formats that they trained in."""
    lines = []
    for variant in plan.variants[1:]:
        settings = [run.record["config"].get("nvfp4", {}) for run in found.of(variant).values()]
        for recipe in sorted({s.get("validation_recipe", "") for s in settings} - {""}):
            lines.append(f"- {variant.name}: validated in {recipe}")
    return [*lines, ""] if lines else []


def _losses(losses: dict[int, float]) -> str:
    return " ".join(f"{loss:.4f}" for loss in losses.values())


def _courses(verdicts: dict[str, Verdict | str]) -> list[str]:
    judged = {name: v for name, v in verdicts.items() if isinstance(v, Verdict)}
    if not judged:
        return []
    steps = sorted(set.intersection(*(set(v.course) for v in judged.values())))
    # A table that fits a page: the last validation, and every so many before it.
    steps = steps[:: -max(1, len(steps) // 6)][::-1]
    rows = [(name, *(f"{v.course[s]:+.2%}" for s in steps)) for name, v in judged.items()]
    return ["Gap by step:", "", *markdown_table(("variant", *steps), rows), ""]


def switches(plan: Plan, verdicts: dict[str, Verdict | str], steps: int) -> list[str]:
    """Gaps around the switches of variants with a schedule of their own."""
    lines = []
    for variant in plan.variants[1:]:
        verdict = verdicts[variant.name]
        for change in variant.schedule(steps) if isinstance(verdict, Verdict) else ():
            done = change.first_step - 1
            before = [step for step in verdict.course if step <= done]
            after = [step for step in verdict.course if step > done]
            gaps = [
                f"{verdict.course[step]:+.2%} at step {step}"
                for step in (*before[-1:], *after[:1], *after[-1:][: len(after) - 1])
            ]
            lines.append(
                f"- {variant.name}, {change.gemm} as in {change.recipe} after step {done}: "
                + ", ".join(gaps)
            )
    return ["Gap around switches:", "", *lines, ""] if lines else []


def _experts(verdicts: dict[str, Verdict | str]) -> list[str]:
    found = {n: v.expert_shares for n, v in verdicts.items() if isinstance(v, Verdict)}
    lines = [
        f"- {name}: "
        + ", ".join(f"{own:.0%} (control {other:.0%})" for own, other in shares.values())
        for name, shares in found.items()
        if shares
    ]
    head = "Tokens of the least fed expert in the last validation, of an even share, by seed:"
    return [head, "", *lines, ""] if lines else []


def write_report(
    output: Path,
    plan: Plan,
    found: Found,
    verdicts: dict[str, Verdict | str],
    limits: Thresholds,
    commit: str | None = None,
) -> str:
    """Write all files; returns the Markdown report.

    Args:
        output: Path without a suffix.
        plan: What was to be run.
        found: What was.
        verdicts: By variant.
        limits: Thresholds.
        commit: Of the source, for runs that were made outside of a git checkout.

    Raises:
        ConfigError: no run has finished.
    """
    if not found.runs:
        raise ConfigError("; ".join(found.errors.values()) or "there is no run")
    spread = control_noise(plan, found, limits)
    rows = run_rows(plan, found, limits, commit)
    result_file(output, ".json").write_text(json.dumps(rows, indent=1) + "\n")
    record = next(iter(found.runs.values())).record
    details = {
        "passed": passed(verdicts),
        "thresholds": asdict(limits),
        "noise": spread,
        "variants": {
            name: {"error": v} if isinstance(v, str) else asdict(v) | {"gap": v.gap}
            for name, v in verdicts.items()
        },
        **{key: record[key] for key in _ABOUT},
        "runs": {
            f"{name}_seed{seed}": {
                "command": shlex.join(run.record["command"][1:]),
                "validation": run.validation,
                "train": run.train,
            }
            for (name, seed), run in found.runs.items()
        },
    }
    result_file(output, "_verdict.json").write_text(json.dumps(details, indent=1) + "\n")
    text = markdown(plan, found, verdicts, spread, limits)
    result_file(output, ".md").write_text(text)
    curves = {variant.name: found.of(variant) for variant in plan.variants if found.of(variant)}
    if plan.variants[0].name in curves:
        title = f"{_model(next(iter(found.runs.values())))}, {record['device']}"
        plot_gaps(curves, title, result_file(output, ".png"))
    return text
