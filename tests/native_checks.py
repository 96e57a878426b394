"""The native kernels against the oracle: used in Triton's interpreter and on GPUs alike."""

import torch
from backend_checks import KEY, gemms
from support import differing, relative_error

from nvfp4_titan.backends import BACKENDS, OperandUse
from nvfp4_titan.backends.native_layout import from_oracle, group_of_columns, slot_ends
from nvfp4_titan.numerics.grouped import padded_ends
from nvfp4_titan.numerics.layout import TILE_ROWS, from_blocked
from nvfp4_titan.training import grouped_mm, linear


def check_native_quantize(backend, t, rows, cols, device, offs=None) -> None:
    """A native backend's operands of t are the oracle's, in the native layout, bit for bit."""
    uses = tuple(fmt and OperandUse(fmt, stream) for fmt, stream in ((rows, 1), (cols, 4)))
    expected = BACKENDS["reference"].quantize(t, *uses, KEY, offs)
    ends = None if offs is None else offs.to(device)
    actual = backend.quantize(t.to(device), *uses, KEY, ends)
    for i, (mine, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert (mine is None) == (wanted is None)
        if mine is None:
            continue
        assert torch.equal(mine.amax.cpu(), wanted.amax) and mine.K == wanted.K
        pair = from_oracle(wanted.codes, wanted.block_scale, offs, columns=i == 1)
        made = mine.codes.cpu(), mine.block_scale.cpu()
        assert [o.shape for o in made] == [o.shape for o in pair]
        for a, b in zip(_defined(*made, offs, i == 1), _defined(*pair, offs, i == 1), strict=True):
            assert differing(a, b) == 0


def _defined(codes, scale, offs, columns):
    """What GEMMs read of an operand: not the rows and slots of no group."""
    if offs is None:
        return [codes, scale]
    parts, start = [], 0
    if columns:
        for end in slot_ends(offs).tolist():
            parts += (o.contiguous() for o in group_of_columns(codes, scale, start, end))
            start = end
        return parts
    width = codes.shape[1] // 8
    first = 0
    for end, last in zip(offs.tolist(), padded_ends(offs, TILE_ROWS).tolist(), strict=True):
        if end > start:
            blocked = scale[first * width : last * width]
            parts += [codes[start:end], from_blocked(blocked, end - start, width)]
        start, first = end, last
    return parts


def check_native_gemms(backend, x, w, dy, device, tolerance, offs=None, recipe="nvfp4") -> None:
    """All three GEMMs equal the reference's within a tolerance (relative Frobenius)."""

    def run(backend, device, dtype):
        def function(x, w):
            options = {"recipe": recipe, "backend": backend, "key": KEY}
            if offs is None:
                return linear(x, w, **options)
            return grouped_mm(x, w.transpose(1, 2), offs.to(device), **options)

        return gemms(function, *(t.to(device, dtype) for t in (x, w, dy)))

    actual, expected = run(backend, device, x.dtype), run("reference", "cpu", torch.float32)
    for mine, wanted in zip(actual, expected, strict=True):
        assert mine.dtype == x.dtype and mine.shape == wanted.shape
        assert relative_error(mine.cpu(), wanted) <= tolerance
    if offs is not None:
        assert not actual[0][offs[-1] :].any() and not actual[1][offs[-1] :].any()
