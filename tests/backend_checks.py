"""A fast backend against the reference: used in Triton's interpreter and on GPUs alike."""

from dataclasses import replace

import torch
from hypothesis import strategies as st
from support import differing

from nvfp4_titan.backends import BACKENDS, OperandUse
from nvfp4_titan.formats import MXFP8, MXFP8_FLOOR, NVFP4, NVFP4_46
from nvfp4_titan.numerics import QuantizedOperand
from nvfp4_titan.numerics.grouped import padded_rows
from nvfp4_titan.numerics.quantize import global_scale, scaled_values
from nvfp4_titan.recipe import OperandFormat
from nvfp4_titan.training import grouped_mm, key_tensor, linear

KEY = key_tensor(7, "layer")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TOKEN_FORMATS = tuple(
    OperandFormat(rounding=rounding, rht=rht)
    for rounding in ("rtne", "sr")
    for rht in (False, True)
)
FORMATS = TOKEN_FORMATS + tuple(
    OperandFormat(block=(16, 16), rounding=rounding, rht=rht)
    for rounding in ("rtne", "sr")
    for rht in (False, True)
)
OTHER_FORMATS = (
    *(
        OperandFormat(fmt, block, rounding, rht)
        for fmt in (NVFP4_46, NVFP4.single_level())
        for block, rounding, rht in (
            ((1, 16), "rtne", False),
            ((1, 16), "sr", True),
            ((16, 16), "rtne", False),
        )
    ),
    *(OperandFormat(fmt, (rows, 32)) for fmt, rows in ((MXFP8, 1), (MXFP8_FLOOR, 1), (MXFP8, 32))),
)
"""Formats of the other recipes, as they use them; and squares of MXFP8."""


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, exponent: float = 0, seed: int = 0
) -> torch.Tensor:
    """N(0,1), columns of different size, scaled by 10**exponent, clipped to the dtype's range."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-4, 0, shape[-1], dtype=torch.float64) * 10.0**exponent
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def uses(rows: OperandFormat | None, cols: OperandFormat | None):
    """Both uses of a tensor, packed and as values."""
    return tuple(
        fmt and OperandUse(fmt, stream, packed=True, values=True)
        for fmt, stream in ((rows, 1), (cols, 4))
    )


def check_operand(actual: QuantizedOperand, expected: QuantizedOperand) -> None:
    """Codes, scales and amaxes are equal bit for bit, and values are what the codes stand for."""
    fields = (actual.codes, actual.block_scale, actual.values)
    codes, scale, values = (t.cpu() for t in fields)
    fmt, amax = expected.format, None if actual.amax is None else actual.amax.cpu()
    assert codes.shape == expected.codes.shape and actual.K == expected.K
    assert actual.format == fmt and codes.dtype == fmt.code_dtype
    torch.testing.assert_close(amax, expected.amax, rtol=0, atol=0, equal_nan=True)
    expected_scale = expected.block_scale.contiguous()
    assert differing(scale.contiguous(), expected_scale) == 0
    # What a NaN is rounded to is not defined: its scale is NaN.
    defined = ~expected_scale.float().isnan().repeat_interleave(fmt.block // fmt.codes_per_byte, -1)
    codes, wanted = (t.contiguous().view(torch.uint8) for t in (codes, expected.codes))
    assert differing(codes[defined], wanted[defined]) == 0
    check_values(values, codes.view(fmt.code_dtype), expected_scale, amax, fmt)


def check_values(values, codes, scale, amax, fmt) -> None:
    """Values are lut[q] * S_b * 2**e, or MXFP8's code * scale; NaN where the scale is."""
    exact = scaled_values(codes.contiguous(), scale, torch.bfloat16, fmt)
    defined = ~scale.float().isnan().repeat_interleave(fmt.block, -1)
    assert values.dtype == torch.bfloat16 and not values[~defined].isfinite().any()
    if fmt.codes_per_byte == 1:
        assert torch.equal(values[defined], exact[defined])
        return
    amax = torch.tensor(fmt.encode_max) if amax is None else amax
    mantissa, exponent = torch.frexp(global_scale(amax, fmt))
    exponent = torch.where(mantissa.isfinite(), exponent - 1, 128)
    exponent = torch.where(mantissa == 0, -127, exponent).clamp(-100, -8)
    factor = 2.0**exponent
    factor = factor[:, None, None] if amax.dim() else factor
    assert torch.equal(values.float()[defined], (exact.float() * factor)[defined])


def check_quantize(t: torch.Tensor, rows, cols, device: str, offs=None, **kwargs) -> None:
    """A backend's operands of t equal the reference's."""
    pair = uses(rows, cols)
    expected = BACKENDS["reference"].quantize(t, *pair, KEY, offs, **kwargs)
    on_device = {name: v.to(device) if torch.is_tensor(v) else v for name, v in kwargs.items()}
    ends = None if offs is None else offs.to(device)
    actual = BACKENDS["triton"].quantize(t.to(device), *pair, KEY, ends, **on_device)
    for i, (mine, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert (mine is None) == (wanted is None)
        if mine is None:
            continue
        if offs is None:
            check_operand(mine, wanted)
        else:
            check_groups(mine, wanted, offs, along_tokens=i == 1)


def check_groups(mine, wanted, offs, along_tokens: bool) -> None:
    """As check_operand, for tokens in groups: rows of no group do not count."""
    start = slot = 0
    for e, end in enumerate(offs.tolist()):
        slots = padded_rows(end - start, 0, wanted.format.block)
        if along_tokens:
            part = (slice(None), slice(slot, slot + slots))
        else:
            part = (slice(start, end), slice(None))
        check_operand(part_of(mine, part, e), part_of(wanted, part, e))
        start, slot = end, slot + slots


def part_of(operand: QuantizedOperand, part: tuple[slice, slice], group: int) -> QuantizedOperand:
    """Rows and elements of an operand that belong to a group."""
    rows, columns = part
    packed = {}
    fmt = operand.format
    for name, n in (("codes", fmt.codes_per_byte), ("block_scale", fmt.block)):
        whole = columns == slice(None)
        span = columns if whole else slice(columns.start // n, columns.stop // n)
        packed[name] = getattr(operand, name)[rows, span]
    values = None if operand.values is None else operand.values[rows, columns]
    amax = None if operand.amax is None else operand.amax[group]
    return replace(operand, **packed, amax=amax, values=values)


def gemms(function, x, w, dy):
    """y, dx, dw of fresh leaves."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = function(x, w)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


def check_gemms(x, w, dy, device: str, tolerance: float, offs=None, recipe="nvfp4") -> None:
    """All three GEMMs equal the reference's within a tolerance (relative Frobenius).

    Args:
        x: (M, K).
        w: (N, K), or (E, N, K) with offs.
        dy: (M, N).
        device: Where the backend runs; the reference runs on the CPU, in fp32.
        tolerance: Of y, dx and dw.
        offs: Group ends.
        recipe: Name or Recipe.
    """

    def run(backend, device, dtype):
        def function(x, w):
            options = {"recipe": recipe, "backend": backend, "key": KEY}
            if offs is None:
                return linear(x, w, **options)
            return grouped_mm(x, w.transpose(1, 2), offs.to(device), **options)

        return gemms(function, *(t.to(device, dtype) for t in (x, w, dy)))

    actual = run("triton", device, x.dtype)
    expected = run("reference", "cpu", torch.float32)
    for mine, wanted in zip(actual, expected, strict=True):
        assert mine.dtype == x.dtype and mine.shape == wanted.shape
        error = (mine.cpu().double() - wanted.double()).norm()
        assert error <= tolerance * wanted.double().norm()  # an expert without tokens has dw == 0
    if offs is not None:
        assert not actual[0][offs[-1] :].any() and not actual[1][offs[-1] :].any()
