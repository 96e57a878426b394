"""What several tests measure with."""

import math
import time
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from nvfp4_titan.backends import BACKENDS, Backend
from nvfp4_titan.titan import cpu_runtime

GOLDEN = Path(__file__).parent / "golden" / "te_nvfp4.npz"

# Half width of the windows around the measured mean over 5 seeds on N(0,1), +- 0.15 dB.
WINDOW_DB = 0.15

TOLERANCES = {
    # fp32 GEMMs over exact operands: only the order of accumulation differs.
    "golden_gemm": 1e-5,
    # One bf16 rounding of the output, relative Frobenius (measured 1.6e-3).
    "bf16_output": 3e-3,
}


@cache
def golden() -> dict[str, torch.Tensor]:
    """TransformerEngine's reference vectors by name."""
    with np.load(GOLDEN) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def sqnr(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal to quantization noise, dB."""
    noise = (actual.double() - expected.double()).norm()
    return 20 * math.log10(expected.double().norm() / noise)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def differing(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """Number of elements that differ, bytes compared."""
    return int((actual.view(torch.uint8) != expected.view(torch.uint8)).sum())


def same_operand(actual, expected) -> bool:
    """Whether two quantized operands are equal bit for bit."""
    return (
        actual.codes.shape == expected.codes.shape
        and differing(actual.codes, expected.codes) == 0
        and differing(actual.block_scale, expected.block_scale) == 0
        and torch.equal(actual.amax, expected.amax)
    )


def sylvester(size: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def saved_tensors(y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """What the GEMM function behind y keeps for backward."""
    node = y.grad_fn
    while type(node).__name__ != "QuantizedGemmBackward":
        node = node.next_functions[0][0]
    # (offs, key, x's codes, scale, amax, w's codes, scale, amax)
    return node.saved_tensors


KINDS = {0: "x", 5: "x", 1: "w", 3: "w", 6: "w", 2: "dy", 4: "dy"}  # by SR stream


def recording(fault: str | None = None) -> tuple[Backend, list[tuple]]:
    """The reference backend, and a list of the operands that it makes.

    Args:
        fault: None, "no reduction" (every shard uses its own amax) or "noise tied to a rank" (SR
            counts from the shard's own start).

    Returns:
        The backend, and per call ("x", "w" or "dy", row operand, column operand), where an operand
        is (codes, block scale as bytes, amax) or None.
    """
    reference, made = BACKENDS["reference"], []

    def quantize(t, rows, cols, key=None, offs=None, amax=None, offset=(0, 0)):
        if fault == "no reduction":
            amax = None
        if fault == "noise tied to a rank" and amax is not None:
            offset = (0, 0)
        operands = reference.quantize(t, rows, cols, key, offs, amax, offset)
        kind = KINDS[(rows or cols).stream]
        if kind == "w" and torch._C._current_graph_task_id() != -1:
            return operands  # made again for backward
        tensors = [o and (o.codes, o.block_scale.view(torch.uint8), o.amax) for o in operands]
        made.append((kind, *tensors))
        return operands

    return replace(reference, quantize=quantize), made


SMALL_RUN = (
    "--metrics.log_freq=1",
    "--metrics.enable_tensorboard",
    "--training.mixed_precision_param=float32",
    "--training.local_batch_size=2",
    "--training.seq_len=64",
    "--debug.seed=0",
    "--optimizer.implementation=foreach",
    "--activation_checkpoint.mode=none",
)
"""torchtitan's options of a run that takes seconds and logs every step."""


FOUR_STEPS = (
    "--model.name=llama3",
    "--model.flavor=debugmodel",
    "--training.dataset=stdlib",
    "--lr_scheduler.warmup_steps=2",
    "--lr_scheduler.total_steps=4",
    "--training.steps=4",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
    "--checkpoint.no-last-save-model-only",
)
"""Beside SMALL_RUN: four steps of the Llama3 debug model, saved every second."""


def processes_naming(folder: Path) -> list[int]:
    """Numbers of this host's processes, a rank's data worker too, whose command names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended since
            if str(folder) in path.read_text(errors="replace"):
                found.append(int(path.parent.name))
    return found


def logged_losses(dump_folder: Path) -> dict[int, float]:
    """Loss by step of every start of a run; steps that ran twice must agree."""
    return logged_scalars(dump_folder, "loss_metrics/global_avg_loss")


def logged_scalars(dump_folder: Path, name: str) -> dict[int, float]:
    """A scalar by step of every start of a run; {} where there is none of this name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in sorted((dump_folder / "tb").glob("*")):
        events = EventAccumulator(str(path))
        events.Reload()
        if name in events.Tags()["scalars"]:  # not where it was killed in its first step
            for event in events.Scalars(name):
                assert found.setdefault(event.step, event.value) == event.value
    return found


def do_not_sleep() -> None:
    """Have torchtitan's rank 0 end without the two seconds that it gives the others to."""
    cpu_runtime.install()
    import torchtitan.train  # must come after install()

    torchtitan.train.time = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
