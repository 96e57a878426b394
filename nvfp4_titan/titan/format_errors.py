"""The error of each format on a model's real operands: x, w and dy of its linears, after training.

`scripts/measure_formats.py` trains with torchtitan's options, runs one more batch, and writes
format_errors.json: by operand and format the SQNR in dB, averaged over the linears, with the run's
command, device and versions. 0 dB is a format that made zeros of everything.
"""

import json
import math
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from ..errors import ConfigError
from ..numerics import dequantize, quantize, rht
from ..numerics.quantize import pad_to_blocks
from ..scalars import RECORD
from .trainer import NVFP4Trainer

FORMATS = ("nvfp4", "nvfp4_46", "nvfp4_single", "mxfp8")
FILE = "format_errors.json"


class MeasuringTrainer(NVFP4Trainer):
    """Trains, then measures formats on the operands of the next batch."""

    def __init__(self, job_config):
        if converters := [name for name in job_config.model.converters if name]:
            raise ConfigError(
                f"formats are measured on plain linears, and {converters[0]} swaps them: add "
                '--model.converters ""'
            )
        super().__init__(job_config)

    def train(self) -> None:
        """Train, run one more batch, and write the errors into the dump folder."""
        super().train()
        found: dict[str, list[dict[str, float]]] = {}
        for operands in self._operands():
            for name, t in operands.items():
                found.setdefault(name, []).append(errors(name, t))
        result = {
            name: {fmt: mean(entry[fmt] for entry in entries) for fmt in entries[0]}
            for name, entries in found.items()
        }
        folder = Path(self.job_config.job.dump_folder)
        run = json.loads((folder / RECORD).read_text())
        about = {key: run[key] for key in ("command", "device", "versions", "corpus_sha256")}
        content = {"sqnr_db": result, "linears": len(found["w"]), **about}
        (folder / FILE).write_text(json.dumps(content, indent=1) + "\n")

    def _operands(self) -> list[dict[str, torch.Tensor]]:
        """x, w and dy (2D) of every linear."""
        linears = [m for part in self.model_parts for m in part.modules() if type(m) is nn.Linear]
        found: list[dict[str, torch.Tensor]] = [{} for _ in linears]

        def keep(i: int, name: str, t: torch.Tensor) -> None:
            found[i][name] = t.detach().flatten(0, -2).float()

        hooks = []
        for i, module in enumerate(linears):
            found[i]["w"] = module.weight.detach().float()
            hooks += [
                module.register_forward_hook(lambda m, args, y, i=i: keep(i, "x", args[0])),
                module.register_full_backward_hook(lambda m, dx, dy, i=i: keep(i, "dy", dy[0])),
            ]
        input_dict, labels = next(self.batch_generator(self.dataloader))
        self.forward_backward_step(
            input_dict={name: t.to(self.device) for name, t in input_dict.items()},
            labels=labels.to(self.device),
            global_valid_tokens=torch.tensor(float(labels.numel()), device=self.device),
        )
        for hook in hooks:
            hook.remove()
        return found


def errors(name: str, t: torch.Tensor) -> dict[str, float]:
    """SQNR, dB, of an operand by format and use: blocks along the last dim, as fprop has them.

    Args:
        name: "x", "w" or "dy".
        t: (M, K) fp32.
    """
    turned = rht(pad_to_blocks(t.T.contiguous())).float()
    found = {}
    for fmt in FORMATS:
        found[fmt] = _sqnr(quantize(t, format=fmt), t)
        if fmt == "mxfp8":
            continue
        if name == "w":
            found[f"{fmt}, 16x16"] = _sqnr(quantize(t, format=fmt, block=(16, 16)), t)
            continue
        rounding = {"rounding": "sr" if name == "dy" else "rtne", "seed": 0}
        found[f"{fmt}, RHT"] = _sqnr(quantize(t.T, format=fmt, rht=True, **rounding), turned)
        if name == "dy":
            found[f"{fmt}, SR"] = _sqnr(quantize(t, format=fmt, **rounding), t)
    return found


def _sqnr(operand, t: torch.Tensor) -> float:
    error = dequantize(operand) - t[..., : operand.K]
    return 20 * math.log10(t.norm() / error.norm())
