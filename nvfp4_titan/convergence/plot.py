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
