"""What quantization does to the GEMMs of a model in one step, against high precision.

An `Observer` puts an observing Backend in the place of each converted weight's own for as long as
it is attached: it passes every call on, and compares a sample of what comes back with the same
thing computed from the tensors that went in. Detached, nothing of it is left: it costs nothing.

    fprop   y[tokens, some n]     against  x @ w[some n].T
    dgrad   dx[tokens, some k]    against  dy @ w[:, some k]
    wgrad   dw[some n, some k]    against  dy[:, some n].T @ x[:, some k]

Of x and w no more than the sampled columns is kept for backward, found again by the address of the
operand's codes. Everything is local: a shard of a tensor-parallel GEMM is compared with the same
shard. It must run eagerly (a compiled graph would not call it).

Sums, not ratios, are kept, so that microbatches and ranks add up; `telemetry.figures` makes ratios.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..backends import Backend, OperandUse, plain_operand, stream
from ..distributed.tensor_parallel import first_index
from ..numerics import QuantizedOperand, dequantize, rht
from ..numerics.grouped import group_layout
from ..numerics.quantize import pad_to_blocks
from ..numerics.rounding import decode_codes
from .experts import Converted
from .linear import NVFP4Linear

X, W, DY = "x", "w", "dy"
_ROLES = {
    stream("fprop", "left"): ("fprop", X),
    stream("fprop", "right"): ("fprop", W),
    stream("dgrad", "left"): ("dgrad", DY),
    stream("dgrad", "right"): ("dgrad", W),
    stream("wgrad", "left"): ("wgrad", DY),
    stream("wgrad", "right"): ("wgrad", X),
}
_SAMPLE, _TOKENS = 32, 512
"""Features and tokens of a sample; experts get the tokens each."""
_FEW = 16
"""Tokens below which an expert's GEMM is not compared: too few to judge."""

GEMM_SUMS = ("dot", "exact", "actual", "error")
"""Sums of actual * exact, exact ** 2, actual ** 2, (actual - exact) ** 2."""
OPERAND_SUMS = (
    "dot", "exact", "actual", "error", "nonzero", "zeros", "count", "saturated", "blocks",
    "underflown", "inside", "rounded_away", "turned", "turned_dot", "plain", "plain_dot",
)  # fmt: skip
"""The same of an operand, in the space it is quantized in; elements that are not 0, those of them
that became 0, codes, codes of the largest magnitude, blocks that hold a value, those of them with a
scale of 0, codes inside the range, those of them that are not the nearest; of wgrad alone the
energy of the tensor under the RHT and its product with the operand, and both without the RHT."""

Key = tuple[str, str, int]
"""FQN of a weight, "gemm" or "gemm/operand", expert (-1 for a linear, and for operands)."""


class Observer:
    """Observes the converted weights of a model while attached.

    Args:
        model_parts: Converted models (pipeline stages), sharded and compiled or not.
    """

    def __init__(self, model_parts: Iterable[nn.Module]):
        self._sites = [
            _Site(clean_fqn(f"{fqn}.{name}"), module, name)
            for part in model_parts
            for fqn, module in part.named_modules()
            if isinstance(module, Converted)
            for name in module.recipes()
        ]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Observe every GEMM of the converted weights meanwhile."""
        modules = {site.module for site in self._sites}
        for module in modules:
            module.being_observed, module.kept_weights = True, None
        for site in self._sites:
            site.attach()
        try:
            yield
        finally:
            for site in self._sites:
                site.detach()
            for module in modules:
                module.being_observed = False

    def take(self) -> dict[Key, list[float]]:
        """The sums since the last call, of this rank; reading them waits for the device."""
        found = {}
        for site in self._sites:
            for (what, expert), sums in site.sums.items():
                found[site.fqn, what, expert] = sums.tolist()
            site.sums.clear()
        return found

    def forget(self) -> None:
        """Drop what was seen: it was no training."""
        for site in self._sites:
            site.sums.clear()
            site.clear()


def clean_fqn(name: str) -> str:
    """A parameter's name without what wrappers put in between."""
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name


@dataclass
class _Seen:
    """A tensor on its way into a GEMM."""

    tensor: torch.Tensor
    offs: torch.Tensor | None


class _Site:
    """One converted weight."""

    def __init__(self, fqn: str, module: nn.Module, name: str):
        self.fqn, self.module, self.name = fqn, module, name
        self.sums: dict[tuple[str, int], torch.Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Forget the tensors on their way."""
        self.now: dict[str, _Seen] = {}
        self.backward = False
        # By address of codes: sampled columns of x and w for backward, the expert, and the codes:
        # while they live, nothing else has their address.
        self.columns: dict[str, dict[int, tuple[torch.Tensor, int, torch.Tensor]]] = {X: {}, W: {}}
        self.calls = 0

    def attach(self) -> None:
        self._own = self.module.recipes()[self.name][1]
        self._set(observing(self._own, self))

    def detach(self) -> None:
        self._set(self._own)
        self.clear()

    def _set(self, backend: Backend) -> None:
        self.module.change_backend(self.name, backend)

    def quantized(
        self,
        t: torch.Tensor,
        uses: tuple[OperandUse | None, OperandUse | None],
        operands: tuple[QuantizedOperand | None, QuantizedOperand | None],
        offs: torch.Tensor | None,
    ) -> None:
        """Note a tensor, and what became of it."""
        # A stream of its own marks a weight that backward quantizes again.
        roles = [_ROLES.get(use.stream, (None, W)) for use in uses if use]
        kind = roles[0][1]
        self.backward = kind == DY or (kind == W and self.backward)
        if kind == X:
            self.now.clear()
            self.calls += 1
        self.now[kind] = _Seen(t, offs)
        for use, operand, transposed in zip(uses, operands, (False, True), strict=True):
            if use is None:
                continue
            if kind != DY:
                sample = t[..., _spread(t.shape[-1])].clone()
                # What backward quantizes again comes in no order of calls.
                expert = self._expert(t) if use.stream in _ROLES else -1
                self.columns[kind][operand.codes.data_ptr()] = sample, expert, operand.codes
            gemm, _ = _ROLES.get(use.stream, (None, W))
            if gemm is not None:
                sums = operand_sums(t, operand, use, transposed, offs)
                self._add(f"{gemm}/{kind}", -1, sums)

    def multiplied(self, b: QuantizedOperand, out: torch.Tensor, b_transposed: bool) -> None:
        """Compare a fprop or dgrad."""
        if DY in self.now:
            left, gemm = self.now[DY], "dgrad"
            indices = _spread(out.shape[-1])
            right, expert, _ = self.columns[W].get(b.codes.data_ptr(), (None, -1, None))
            if right is None:  # a weight that was gathered in codes
                whole = dequantize(_contiguous(b))
                right = (whole if b_transposed else whole.mT)[..., indices]
        elif X in self.now:
            left, gemm = self.now[X], "fprop"
            indices = _spread(out.shape[-1])
            w = self.now[W].tensor if W in self.now else dequantize(_contiguous(b))
            right, expert = w[..., indices, :].mT, self._expert(left.tensor)
        else:
            return
        if left.offs is None:
            rows = _spread(out.shape[0], _TOKENS)
            exact = left.tensor[rows].float() @ right.float()
            self._compare(gemm, expert, len(left.tensor), out[rows][:, indices], exact)
            return
        first, _ = self._experts()
        for e, (start, end) in enumerate(_bounds(left.offs)):
            rows = start + _spread(end - start, _TOKENS)
            exact = left.tensor[rows].float() @ right[e].float()
            self._compare(gemm, first + e, end - start, out[rows][:, indices], exact)

    def weight_gradient(self, x: QuantizedOperand, dw: torch.Tensor) -> None:
        """Compare a wgrad."""
        seen = self.now.get(DY)
        columns, expert, _ = self.columns[X].get(x.codes.data_ptr(), (None, -1, None))
        if seen is None or columns is None:
            return
        rows, indices = _spread(dw.shape[-2]), _spread(dw.shape[-1])
        dy = seen.tensor[:, rows].float()
        if seen.offs is None:
            exact = dy.T @ columns.float()
            self._compare("wgrad", expert, len(dy), dw[rows][:, indices], exact)
            return
        first, _ = self._experts()
        for e, (start, end) in enumerate(_bounds(seen.offs)):
            exact = dy[start:end].T @ columns[start:end].float()
            self._compare("wgrad", first + e, end - start, dw[e][rows][:, indices], exact)

    def _compare(
        self, gemm: str, expert: int, tokens: int, actual: torch.Tensor, exact: torch.Tensor
    ) -> None:
        if expert < 0 or tokens >= _FEW:
            self._add(gemm, expert, gemm_sums(actual, exact))

    def _expert(self, t: torch.Tensor) -> int:
        """Global number of the expert that a plain GEMM belongs to; -1 for none, or for many.

        Without grouped GEMMs torchtitan calls the experts one by one, each once and in order.
        """
        x = self.now.get(X)
        if isinstance(self.module, NVFP4Linear) or t.dim() == 3 or x is None or x.offs is not None:
            return -1
        first, count = self._experts()
        return first + (self.calls - 1) % count

    def _add(self, what: str, expert: int, sums: torch.Tensor) -> None:
        known = self.sums.get((what, expert))
        self.sums[what, expert] = sums if known is None else known + sums

    def _experts(self) -> tuple[int, int]:
        """Global number of this rank's first expert, and how many it computes."""
        p = self.module._parameters[self.name]
        if not isinstance(p, DTensor) or "ep" not in (p.device_mesh.mesh_dim_names or ()):
            return 0, p.shape[0]
        mesh, count = p.device_mesh, p.shape[0]
        dim = mesh.mesh_dim_names.index("ep")
        rank, size = mesh.get_coordinate()[dim], mesh.size(dim)
        first = first_index(count, rank, size)
        return first, first_index(count, rank + 1, size) - first


def observing(backend: Backend, site: _Site) -> Backend:
    """A Backend that does what another does, and shows the site what it did."""

    def quantize(t, rows, cols, key=None, offs=None, amax=None, offset=(0, 0)):
        uses = tuple(use and replace(use, packed=True) for use in (rows, cols))
        operands = backend.quantize(t, *uses, key, offs, amax, offset)
        with torch.no_grad():
            site.quantized(t.detach(), uses, operands, offs)
        return operands

    def mm(a, b, columns, out_dtype, b_transposed=False, offs=None):
        out = backend.mm(a, b, columns, out_dtype, b_transposed, offs)
        with torch.no_grad():
            site.multiplied(b, out, b_transposed)
        return out

    def wgrad(dy, x, out_dtype, offs=None):
        dw = backend.wgrad(dy, x, out_dtype, offs)
        with torch.no_grad():
            site.weight_gradient(x, dw)
        return dw

    return replace(backend, quantize=quantize, mm=mm, wgrad=wgrad)


def gemm_sums(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """GEMM_SUMS of two tensors, float64."""
    actual, exact = actual.double(), exact.double()
    pairs = ((actual, exact), (exact, exact), (actual, actual), (actual - exact,) * 2)
    return torch.stack([(a * b).sum() for a, b in pairs])


def operand_sums(
    t: torch.Tensor,
    operand: QuantizedOperand,
    use: OperandUse,
    transposed: bool,
    offs: torch.Tensor | None,
) -> torch.Tensor:
    """OPERAND_SUMS of a sample of an operand, float64.

    Args:
        t: (M, K) or (E, N, K), what was quantized.
        operand: Its operand, with codes.
        use: How it was quantized.
        transposed: Whether the contraction runs along the dim before t's last.
        offs: Group ends of tokens.
    """
    fmt, operand = operand.format, plain_operand(operand, offs, transposed)
    plain, scale = _sampled(t, transposed, offs, operand)
    rows = _spread(operand.codes.shape[-2])
    codes, block_scale = (
        f[..., rows, :].contiguous() for f in (operand.codes, operand.block_scale)
    )
    values = codes.float() if fmt.codes_per_byte == 1 else decode_codes(codes)
    decode = block_scale.float().repeat_interleave(fmt.block, -1)
    if scale is not None:
        decode = decode * scale
    actual = values * decode
    turned = None
    if _ROLES[use.stream][0] == "wgrad" and plain.dim() == 2:
        turned = rht(plain).float()
    exact = turned if use.format.rht and turned is not None else plain
    nonzero = exact != 0
    blocks = nonzero.unflatten(-1, (-1, fmt.block)).any(-1)
    largest = fmt.element_max
    sums = [*gemm_sums(actual, exact).unbind(), nonzero.sum(), (nonzero & (values == 0)).sum()]
    sums += [nonzero.sum(), (nonzero & (values.abs() == largest)).sum()]
    sums += [blocks.sum(), (blocks & (block_scale.float() == 0)).sum()]
    sums += [*_rounded_away(exact, values, decode, fmt.values)]
    if turned is None:
        sums += [nonzero.new_zeros(())] * 4
    else:
        sums += [(turned * turned).sum(), (turned * actual).sum()]
        sums += [(plain * plain).sum(), (plain * actual).sum()]
    return torch.stack([s.double() for s in sums])


def _rounded_away(
    exact: torch.Tensor, values: torch.Tensor, decode: torch.Tensor, grid: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements inside the range, and those of them whose code is not the nearest (4 bits only)."""
    if not grid:
        return exact.new_zeros(()), exact.new_zeros(())
    wanted = exact.abs() / decode
    inside = (decode > 0) & (wanted <= grid[-1])
    step = torch.where(wanted < 2, 0.5, torch.where(wanted < 4, 1.0, 2.0))
    # A little more than half a step: neither a tie nor an fp32 rounding counts.
    away = inside & ((values.abs() - wanted).abs() > 0.502 * step)
    return inside.sum(), away.sum()


def _sampled(
    t: torch.Tensor, transposed: bool, offs: torch.Tensor | None, operand: QuantizedOperand
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of the sample as the operand has them, padded, fp32; and what decodes each element.

    The second is the fp32 scale per tensor, broadcast to the first; None where there is none.
    """
    block, scale = operand.format.block, operand.global_scale
    rows = _spread(operand.codes.shape[-2])
    if t.dim() == 3:
        sample = (t.mT if transposed else t)[:, rows].float()
        sample = nn.functional.pad(sample, (0, -sample.shape[-1] % block))
        return sample, None if scale is None else scale.view(-1, 1, 1)
    if offs is None:
        sample = (t.T if transposed else t)[rows].float()
        return pad_to_blocks(sample, block=block), scale
    layout = group_layout(offs, t.shape[0], block)
    # Rows (slots) of no group: nothing depends on them.
    spread = None if scale is None else torch.cat((scale, scale.new_zeros(1)))
    if not transposed:
        group = layout.row_group[rows]
        sample = torch.where((group < len(offs)).unsqueeze(1), t[rows].float(), 0.0)
        return pad_to_blocks(sample, block=block), None if scale is None else spread[group][:, None]
    padded = torch.cat((t, t.new_zeros(1, t.shape[1])))[layout.slot_row]
    group = layout.block_group.repeat_interleave(block)
    return padded[:, rows].T.float(), None if scale is None else spread[group]


def _spread(size: int, count: int = _SAMPLE) -> torch.Tensor:
    """Indices of up to `count` of `size` elements, evenly spread."""
    if size <= count:
        return torch.arange(size)
    # Odd strides meet every position in a block.
    return (torch.arange(count) * (size // count | 1)) % size


def _bounds(offs: torch.Tensor) -> list[tuple[int, int]]:
    ends = offs.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _contiguous(operand: QuantizedOperand) -> QuantizedOperand:
    tensors = {"codes": operand.codes, "block_scale": operand.block_scale}
    return replace(operand, **{name: t.contiguous() for name, t in tensors.items()})


def add_up(parts: Iterable[dict[Key, list[float]]]) -> dict[Key, list[float]]:
    """Sums over ranks."""
    total: dict[Key, list[float]] = defaultdict(list)
    for part in parts:
        for key, sums in part.items():
            known = total[key] or [0.0] * len(sums)
            total[key] = [a + b for a, b in zip(known, sums, strict=True)]
    return dict(total)
