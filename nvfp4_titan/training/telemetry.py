"""From an Observer's sums to figures, and which of them are not sane.

    GEMM      sqnr_db, gain (<actual, exact> / <exact, exact>), cosine; experts: the worst gain
    operand   sqnr_db, zeros (of values that are not 0), saturated (codes of the largest
              magnitude), underflow (of blocks that hold a value), rounded_away (of codes inside the
              range: those that are not the nearest; about 0.2 with SR, 0 without)
    wgrad     same_rht: 1 where both operands are under the same RHT or both under none, else 0

Bounds are wide around what sound runs show (docs/convergence.md has figures), so that what crosses
them is a fault and not bad luck.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

from .observe import DY, GEMM_SUMS, OPERAND_SUMS, Key

Figures = dict[tuple[str, str], dict[str, float]]
"""By weight's FQN and "gemm" or "gemm/operand", figures by name."""

SR_SHARE = 0.03
"""Share of codes that are not the nearest above which rounding is stochastic."""
_TRANSFORMED = 0.5
"""Cosine with the transformed tensor above which an operand is under the RHT."""


@dataclass(frozen=True)
class Bound:
    """Where a figure of sound training lies, and what it means if it does not."""

    figure: str
    low: float
    high: float
    meaning: str


GEMM_BOUNDS = (
    Bound("gain", 0.93, 1.07, "its results are too small or too large: look at global scales"),
    Bound("worst_gain", 0.93, 1.07, "an expert's results are too small or too large"),
    Bound("cosine", 0.9, math.inf, "its results point elsewhere"),
    Bound("same_rht", 1, 1, "its operands are not under the same Hadamard transform"),
)
OPERAND_BOUNDS = (
    Bound("gain", 0.95, 1.05, "it decodes to another size: look at its global scale"),
    Bound("sqnr_db", 10, math.inf, "it is hardly represented"),
    Bound("saturated", 0, 0.3, "its scales are too small"),
    Bound("underflow", 0, 0.1, "blocks that hold values became zeros"),
)
DY_BOUND = Bound("rounded_away", SR_SHARE, 1, "gradients are not rounded stochastically")
FORWARD_BOUND = Bound("rounded_away", 0, SR_SHARE, "it is rounded stochastically")


@dataclass(frozen=True)
class Finding:
    """A figure outside of its bounds."""

    fqn: str
    what: str
    figure: str
    value: float
    meaning: str

    def __str__(self) -> str:
        return f"{self.fqn} {self.what}: {self.figure} = {self.value:.3g}, {self.meaning}"


def figures(sums: dict[Key, list[float]]) -> Figures:
    """Figures of all weights.

    Args:
        sums: Of all ranks, from `add_up`.
    """
    found: Figures = {}
    experts: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    by_gemm: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for (fqn, what, expert), values in sums.items():
        if "/" in what:
            found[fqn, what] = _operand_figures(dict(zip(OPERAND_SUMS, values, strict=True)))
            continue
        by_gemm[fqn, what].append(values)
        if expert >= 0:
            gemm = _gemm_figures(dict(zip(GEMM_SUMS, values, strict=True)))
            experts[fqn, what].append(gemm | {"expert": expert})
    for key, parts in by_gemm.items():
        total = dict(zip(GEMM_SUMS, map(sum, zip(*parts, strict=True)), strict=True))
        found[key] = _gemm_figures(total)
        if experts[key]:
            worst = max(experts[key], key=lambda gemm: abs(gemm["gain"] - 1))
            found[key] |= {"worst_gain": worst["gain"], "worst_expert": worst["expert"]}
    for fqn, what in list(found):
        if what == "wgrad":
            sides = [sums.get((fqn, f"wgrad/{operand}", -1)) for operand in ("dy", "x")]
            if None not in sides and any(side[0] for side in sides):
                found[fqn, what]["same_rht"] = float(_same_rht(*sides))
    return found


def _gemm_figures(s: dict[str, float]) -> dict[str, float]:
    return {
        "sqnr_db": _db(s["exact"], s["error"]),
        "gain": _ratio(s["dot"], s["exact"], 1.0),
        "cosine": _ratio(s["dot"], math.sqrt(s["exact"] * s["actual"]), 1.0),
    }


def _operand_figures(s: dict[str, float]) -> dict[str, float]:
    known = _gemm_figures(s) | {
        "zeros": _ratio(s["zeros"], s["nonzero"]),
        "saturated": _ratio(s["saturated"], s["count"]),
        "underflow": _ratio(s["underflown"], s["blocks"]),
    }
    # Formats of 8 bits are rounded to nearest by definition.
    if s["inside"]:
        known["rounded_away"] = s["rounded_away"] / s["inside"]
    return known


def _same_rht(*sides: list[float]) -> bool:
    """Whether both operands are under the RHT or both are plain."""
    states = set()
    for values in sides:
        s = dict(zip(OPERAND_SUMS, values, strict=True))
        cosines = [
            _ratio(s[f"{space}_dot"], math.sqrt(s[space] * s["actual"]), 1.0)
            for space in ("turned", "plain")
        ]
        # Neither: another transform than ours, such as other signs.
        states.add(cosines.index(max(cosines)) if max(cosines) > _TRANSFORMED else None)
    return len(states) == 1 and None not in states


def insane(found: Figures) -> list[Finding]:
    """Figures outside of their bounds."""
    warnings = []
    for (fqn, what), values in found.items():
        gemm, _, operand = what.partition("/")
        bounds = OPERAND_BOUNDS if operand else GEMM_BOUNDS
        if operand:
            bounds = (*bounds, DY_BOUND if operand == DY else FORWARD_BOUND)
        for bound in bounds:
            value = values.get(bound.figure)
            # Not "outside": NaN must not pass.
            if value is not None and not bound.low <= value <= bound.high:
                warnings.append(Finding(fqn, what, bound.figure, value, bound.meaning))
    return warnings


def worst(found: Figures, count: int = 10) -> list[tuple[str, str, dict[str, float]]]:
    """GEMMs with the lowest SQNR: FQN, GEMM, figures."""
    gemms = [(fqn, what, values) for (fqn, what), values in found.items() if "/" not in what]
    return sorted(gemms, key=lambda item: item[2]["sqnr_db"])[:count]


def format_worst(found: Figures, count: int = 10) -> str:
    """The worst GEMMs as lines of a log."""
    lines = [
        f"  {values['sqnr_db']:6.2f} dB  gain {values['gain']:.3f}  cosine {values['cosine']:.3f}  "
        f"{fqn} {what}"
        for fqn, what, values in worst(found, count)
    ]
    return "\n".join(lines)


def _db(signal: float, noise: float) -> float:
    # 200 dB stands for "exact": TensorBoard and JSON take no infinity.
    if noise == 0:
        return 200.0
    return 10 * math.log10(signal / noise) if signal > 0 else -200.0


def _ratio(a: float, b: float, default: float = 0.0) -> float:
    return a / b if b else default
