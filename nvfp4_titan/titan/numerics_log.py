"""Numerics telemetry of a training: `nvfp4.numerics_log_freq`, to TensorBoard and the log.

On every so many steps the step runs eagerly, whatever is compiled, and observed. All ranks add up
what they saw, so that parallelism of any kind is one model again.

Tags: numerics/FQN/GEMM/FIGURE and numerics/FQN/GEMM/OPERAND/FIGURE (training/telemetry.py names
them). numerics.json in the dump folder has the figures of the last observation, and, since the run
was last started, the lowest SQNR of each GEMM and the warnings.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed, nn
from torchtitan.tools.logging import logger

from ..scalars import NUMERICS
from ..training.observe import Observer, add_up
from ..training.telemetry import Figures, figures, format_worst, insane
from .pipeline import around_shape_inference


class NumericsLog:
    """Observes steps and reports on them.

    Args:
        model_parts: Converted models, as the trainer holds them.
        frequency: Every how many steps; the first one too. 0 never does anything.
        folder: The run's dump folder.
        pp_schedule: torch.distributed.pipelining's, under pipeline parallelism.
    """

    def __init__(
        self, model_parts: list[nn.Module], frequency: int, folder: Path, pp_schedule=None
    ):
        self._frequency, self._folder = frequency, folder
        self._observer = Observer(model_parts) if frequency else None
        if self._observer and pp_schedule is not None:
            around_shape_inference(pp_schedule, self._forgetting)
        self._last: Figures = {}
        self._lowest: dict[tuple[str, str], float] = {}
        self._warned: dict[tuple[str, str, str], str] = {}

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        yield
        self._observer.forget()

    @contextmanager
    def step(self, step: int, metrics_processor) -> Iterator[None]:
        """Run a training step inside; observed where it is due.

        Args:
            step: Its number, from 1.
            metrics_processor: torchtitan's, whose logger gets the figures.
        """
        if not self._frequency or (step != 1 and step % self._frequency):
            yield
            return
        with torch.compiler.set_stance("force_eager"), self._observer.attached():
            yield
        self._last = figures(add_up(_of_all_ranks(self._observer.take())))
        tags = {
            f"numerics/{fqn}/{what}/{name}": value
            for (fqn, what), values in self._last.items()
            for name, value in values.items()
        }
        metrics_processor.logger.log(tags, step)
        for (fqn, what), values in self._last.items():
            lowest = self._lowest.get((fqn, what), values["sqnr_db"])
            self._lowest[fqn, what] = min(lowest, values["sqnr_db"])
        self._warn(step)

    def _warn(self, step: int) -> None:
        for finding in insane(self._last):
            key = finding.fqn, finding.what, finding.figure
            if key not in self._warned:
                self._warned[key] = f"step {step}: {finding}"
                if distributed.get_rank() == 0:
                    logger.warning(f"NVFP4 numerics, step {step}: {finding}")

    def close(self) -> None:
        """Report on what was seen since the start, on rank 0."""
        if not self._last or distributed.get_rank() != 0:
            return
        logger.info(
            f"NVFP4 numerics: {len(self._warned)} warnings; lowest SQNR of the last observed "
            f"step:\n{format_worst(self._last)}"
        )
        lowest = {f"{fqn} {what}": db for (fqn, what), db in self._lowest.items()}
        last = {f"{fqn} {what}": values for (fqn, what), values in self._last.items()}
        content = {
            "warnings": list(self._warned.values()),
            "lowest_sqnr_db": _finite(lowest),
            "last": {name: _finite(values) for name, values in last.items()},
        }
        (self._folder / NUMERICS).write_text(json.dumps(content, indent=1) + "\n")


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures as JSON has them: of a run that diverged some are NaN, which it has not."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _of_all_ranks(own: dict) -> list[dict]:
    ranks = distributed.get_world_size()
    if ranks == 1:
        return [own]
    found: list[dict] = [{}] * ranks
    distributed.all_gather_object(found, own)
    return found
