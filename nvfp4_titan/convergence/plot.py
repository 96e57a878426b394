"""Loss curves of runs as a PNG."""

from pathlib import Path

from matplotlib.figure import Figure

from .runs import Run


def plot_losses(runs: dict[str, Run], title: str, path: Path) -> None:
    """Training loss (thin) and validation loss (marked) of named runs.

    Args:
        runs: Runs by the name in the legend; the control first.
        title: Title of the figure.
        path: PNG to write.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, run) in enumerate(runs.items()):
        color = f"C{i}"
        axes.plot(list(run.train), list(run.train.values()), color=color, alpha=0.3, linewidth=0.8)
        steps, losses = list(run.validation), list(run.validation.values())
        axes.plot(steps, losses, color=color, marker="o", label=f"{name}: {losses[-1]:.4f}")
    axes.set(title=title, xlabel="step", ylabel="cross entropy, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(title="validation loss, last step")
    figure.savefig(path, dpi=120)


def plot_gaps(runs: dict[str, dict[int, Run]], title: str, path: Path) -> None:
    """Validation losses over seeds, and gaps to the control with its noise band.

    The band, of two and more seeds: the control's own runs against their mean, smallest to largest.

    Args:
        runs: Runs by seed, by name; the control first.
        title: Title of the figure.
        path: PNG to write.
    """
    figure = Figure(figsize=(8, 7), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    control = next(iter(runs.values()))
    steps = sorted(set.intersection(*(set(run.validation) for run in control.values())))
    for i, (name, by_seed) in enumerate(runs.items()):
        for k, (seed, run) in enumerate(by_seed.items()):
            label = name if k == 0 else None
            style = {"color": f"C{i}", "linewidth": 0.9, "marker": ".", "markersize": 4}
            upper.plot(list(run.validation), list(run.validation.values()), label=label, **style)
            if i == 0 or seed not in control:
                continue
            own = [step for step in steps if step in run.validation]
            gaps = [
                100 * (run.validation[step] / control[seed].validation[step] - 1) for step in own
            ]
            lower.plot(own, gaps, **style)  # named in the upper half
    if len(control) > 1:
        losses = [[run.validation[step] for run in control.values()] for step in steps]
        means = [sum(values) / len(values) for values in losses]
        low, high = (
            [100 * (pick(values) / m - 1) for values, m in zip(losses, means, strict=True)]
            for pick in (min, max)
        )
        label = f"{next(iter(runs))}'s seeds"
        lower.fill_between(steps, low, high, color="C0", alpha=0.25, label=label)
    lower.axhline(0, color="C0", linewidth=0.8)
    upper.set(title=title, ylabel="validation, nats per token")
    lower.set(xlabel="step", ylabel="gap to the control, %")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=120)
