"""What a conversion did: every linear and expert weight, converted or kept, and why."""

import re
from collections import Counter
from dataclasses import dataclass

LINEAR, EXPERTS = "linear", "experts"


@dataclass(frozen=True)
class Entry:
    """One linear or one expert weight.

    Attributes:
        fqn: Fully qualified name.
        kind: "linear" or "experts".
        shape: Weight shape, (N, K) or (E, N, K).
        flops_per_token: Forward FLOPs that one token spends here.
        recipe: Name of the recipe it runs in; "bf16" (high precision) where kept.
        converted: Whether it now runs quantized GEMMs.
        reason: What decided.
    """

    fqn: str
    kind: str
    shape: tuple[int, ...]
    flops_per_token: int
    recipe: str
    converted: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """Result of `convert`: the entries in model order, sums over them, and what to look at.

    Attributes:
        entries: In model order.
        notes: What of the defaults found nothing in the model.
        backends: Names of the backends that run the quantized GEMMs.
    """

    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()

    @property
    def converted(self) -> tuple[str, ...]:
        """FQNs that run quantized GEMMs."""
        return tuple(entry.fqn for entry in self.entries if entry.converted)

    @property
    def kept(self) -> tuple[str, ...]:
        """FQNs that stay in high precision."""
        return tuple(entry.fqn for entry in self.entries if not entry.converted)

    @property
    def flops_share(self) -> float:
        """Share of the forward FLOPs of all linears and experts that runs quantized, 0 to 1."""
        total = sum(entry.flops_per_token for entry in self.entries)
        converted = sum(entry.flops_per_token for entry in self.entries if entry.converted)
        return converted / total if total else 0.0

    def __str__(self) -> str:
        """A table with one line per group of layers that differ in nothing but their numbers."""
        groups: dict[tuple, list[Entry]] = {}
        for entry in self.entries:
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", entry.fqn)
            key = (pattern, entry.shape, entry.recipe, entry.converted, entry.reason)
            groups.setdefault(key, []).append(entry)
        lines = []
        width = max(8, *(len(entry.recipe) for entry in self.entries if entry.converted), 0)
        for (pattern, shape, recipe, converted, reason), entries in groups.items():
            size = "x".join(map(str, shape))
            action = f"{recipe if converted else 'kept':<{width}}"
            where = _layers(entry.fqn for entry in entries)
            lines.append(f"  {action} {len(entries):>4} x {pattern}{where} ({size}): {reason}")
        counts = Counter(entry.kind for entry in self.entries if entry.converted)
        totals = Counter(entry.kind for entry in self.entries)
        summary = ", ".join(
            f"{counts[kind]} of {totals[kind]} {name}"
            for kind, name in ((LINEAR, "linears"), (EXPERTS, "expert weights"))
            if totals[kind]
        )
        head = f"NVFP4 conversion: {summary}; {self.flops_share:.1%} of their FLOPs quantized"
        if self.backends:
            head += f" (backend {', '.join(self.backends)})"
        return "\n".join([head, *lines, *(f"  note: {note}" for note in self.notes)])


def _layers(fqns) -> str:
    """ " [0-4,7]" from names that differ in one number, "" from others."""
    numbers = [re.findall(r"(?<=\.)\d+(?=\.)", fqn) for fqn in fqns]
    if not numbers or any(len(found) != 1 for found in numbers):
        return ""
    ranges: list[list[int]] = []
    for number in sorted(int(found[0]) for found in numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    spans = (f"{low}" if low == high else f"{low}-{high}" for low, high in ranges)
    return f" [{','.join(spans)}]"
