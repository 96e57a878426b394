"""Every recipe: its GEMMs are those of its operands, grouped, compiled, in any shape.

A new recipe is one entry of RECIPES and one row of GEMMS here.
"""

from dataclasses import replace

import pytest
import torch
from support import WINDOW_DB, relative_error, saved_tensors, sqnr
from torch import nn
from torchao.prototype.moe_training.mxfp8_linear import (
    MXFP8Dim0CastKernelChoice,
    MXFP8Dim1CastKernelChoice,
    mx_mm,
)
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from nvfp4_titan import RECIPES, convert
from nvfp4_titan.backends import BACKENDS, resolve, stream
from nvfp4_titan.errors import ConfigError, UnsupportedError
from nvfp4_titan.formats import MXFP8
from nvfp4_titan.numerics import dequantize, quantize
from nvfp4_titan.recipe import GEMMS as GEMM_NAMES
from nvfp4_titan.recipe import GemmFormat, OperandFormat, Recipe
from nvfp4_titan.training import grouped_mm, key_tensor, linear

GEMMS = {
    # fprop, dgrad, wgrad, whether backward takes the forward's operands
    "nvfp4": ("nvfp4", "nvfp4", "nvfp4", False),
    "bf16": (None, None, None, False),
    "nvfp4_46": ("nvfp4_46", "nvfp4_46", "nvfp4_46", False),
    "nvfp4_sr_forward": ("nvfp4", "nvfp4", "nvfp4", False),
    "nvfp4_mxfp8": ("nvfp4", "mxfp8", "mxfp8", False),
    "nvfp4_mxfp8_dequantized": ("nvfp4", "mxfp8", "mxfp8", True),
    "nvfp4_bf16": ("nvfp4", None, None, True),
    "nvfp4_bf16_original": ("nvfp4", None, None, False),
    "bf16_nvfp4": (None, "nvfp4", "nvfp4", False),
    "mxfp8": ("mxfp8", "mxfp8", "mxfp8", False),
    "mxfp8_floor": ("mxfp8_floor", "mxfp8_floor", "mxfp8_floor", False),
}
QUANTIZED = [name for name in GEMMS if name != "bf16"]
KEY = key_tensor(3, "layer")


def tensors(m=64, k=96, n=128, dtype=torch.float32):
    # Sizes are multiples of 32: operands by hand then need no padding.
    return tuple(torch.randn(shape).to(dtype) for shape in ((m, k), (n, k), (m, n)))


def run(x, w, dy, **kwargs):
    """y, dx, dw of fresh leaves."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = linear(x, w, backend="reference", key=KEY, **kwargs)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


def test_the_table_is_complete():
    assert set(GEMMS) == set(RECIPES)


def by_hand(name, x, w, dy):
    """y, dx, dw from the oracle's operands and plain matrix products."""
    fprop, dgrad, wgrad, dequantized = GEMMS[name]

    def operand(t, format, gemm, side, is_weight=False):
        """What a GEMM multiplies, in the transformed space where the RHT is on."""
        if format is None:
            return t
        if not format.startswith("nvfp4"):
            return dequantize(quantize(t, format=format))
        block = (16, 16) if is_weight else (1, 16)
        sr_gemms = GEMM_NAMES if name == "nvfp4_sr_forward" else GEMM_NAMES[1:]
        rounding = "sr" if side == "left" and gemm in sr_gemms else "rtne"
        options = {"rounding": rounding, "seed": int(KEY), "stream": stream(gemm, side)}
        return dequantize(quantize(t, format=format, block=block, rht=gemm == "wgrad", **options))

    x_forward = operand(x, fprop, "fprop", "left")
    w_forward = operand(w, fprop, "fprop", "right", True)
    x_source, w_source = (x_forward, w_forward) if dequantized else (x, w)
    w_backward = operand(w_source.T, dgrad, "dgrad", "right", True)
    x_backward = operand(x_source.T, wgrad, "wgrad", "right")
    return (
        x_forward @ w_forward.T,
        operand(dy, dgrad, "dgrad", "left") @ w_backward.T,
        operand(dy.T, wgrad, "wgrad", "left") @ x_backward.T,
    )


@pytest.mark.parametrize("name", GEMMS)
def test_gemms_are_those_of_the_operands(name):
    x, w, dy = tensors()
    for actual, expected in zip(run(x, w, dy, recipe=name), by_hand(name, x, w, dy), strict=True):
        assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("name", GEMMS)
def test_any_shape_dtype_and_frozen_side(name):
    for m, k, n in ((0, 32, 48), (1, 1, 1), (17, 5, 3), (40, 56, 72)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, w, dy = tensors(m, k, n, dtype)
            results = run(x, w, dy, recipe=name)
            for actual, like in zip(results, (dy, x, w), strict=True):
                assert actual.shape == like.shape and actual.dtype == dtype
                assert actual.isfinite().all()
    options = {"recipe": name, "backend": "reference", "key": KEY}
    only_x, only_w = x.clone().requires_grad_(), w.clone().requires_grad_()
    linear(only_x, w, **options).backward(dy)
    linear(x, only_w, **options).backward(dy)
    assert torch.equal(only_x.grad, results[1]) and torch.equal(only_w.grad, results[2])


@pytest.mark.parametrize("name", QUANTIZED)
def test_saved_for_backward(name):
    # Bytes an element of x and w; NVFP4 0.56, MXFP8 1.03, an original its own 4, here without copy.
    fprop, dgrad, wgrad, dequantized = GEMMS[name]
    x, w, _ = (t.requires_grad_() for t in tensors(256, 128, 128))
    y = linear(x, w, recipe=name, backend="reference", key=KEY)
    saved = [t for t in saved_tensors(y) if t is not None and t.numel() > 1]
    kept = [t for t in saved if t.data_ptr() not in (x.data_ptr(), w.data_ptr())]
    size = sum(t.numel() * t.element_size() for t in kept)
    bytes_per_element = {None: 0, "n": 0.5625, "m": 1.03125}

    def of(format):
        return bytes_per_element[format and format[0]]

    x_kept, w_kept = (fprop, fprop) if dequantized else (wgrad, dgrad)
    assert size == x.numel() * of(x_kept) + w.numel() * of(w_kept)
    assert len(saved) - len(kept) == (not dequantized) * [dgrad, wgrad].count(None)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("sizes", [[32, 0, 64, 32], [5, 23, 1, 40]], ids=["aligned", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_group_equals_its_linear(name, sizes, dtype):
    rows, trailing = sum(sizes), 7
    x = torch.randn(rows + trailing, 56).to(dtype).requires_grad_()
    w = torch.randn(len(sizes), 40, 56).to(dtype).requires_grad_()
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    dy = torch.randn(rows + trailing, 40).to(dtype)
    dy *= torch.logspace(-3, 0, rows + trailing)[:, None].to(dtype)
    options = {"recipe": name, "backend": "reference", "key": KEY}
    y = grouped_mm(x, w.transpose(-2, -1), offs, **options)
    y.backward(dy)
    start = 0
    for e, size in enumerate(sizes):
        part = slice(start, start + size)
        expected = run(x[part], w[e], dy[part], recipe=name)
        for which, actual, wanted in zip(
            ("y", "dx", "dw"), (y[part], x.grad[part], w.grad[e]), expected, strict=True
        ):
            assert torch.equal(actual, wanted), (which, e)
        start += size
    assert not y[start:].any() and not x.grad[start:].any()


@pytest.mark.parametrize("name", QUANTIZED)
def test_compiles_to_one_graph_with_the_same_bits(name):
    torch._dynamo.reset()
    # torch's own grouped GEMM compiles in bf16 alone.
    x, w, dy = tensors(40, 56, 72, torch.bfloat16)
    offs = torch.tensor([10, 40], dtype=torch.int32)
    experts = torch.randn(2, 72, 56).bfloat16()
    options = {"recipe": name, "backend": "reference", "key": KEY}

    def plain(x, w):
        return linear(x, w, **options)

    def grouped(x, w):
        return grouped_mm(x, w.transpose(-2, -1), offs, **options)

    for function, weight in ((plain, w), (grouped, experts)):
        results = []
        for f in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
            a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
            y = f(a, b)
            y.backward(dy)
            results.append((y.detach(), a.grad, b.grad))
        assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("name", QUANTIZED)
def test_compiles_with_every_size_dynamic(name):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))  # one alone compiles easily
    convert(model, recipe=name, backend="reference", bf16_last_fraction=0)
    results = []
    for f in (model, torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)):
        model.zero_grad()
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = f(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, model[0].weight.grad))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("where", ["x", "w", "dy"])
def test_special_values_never_look_plausible(name, where):
    named = dict(zip(("x", "w", "dy"), tensors(), strict=True))
    named[where] = named[where].clone()
    named[where][3, 5] = torch.nan
    y, dx, dw = run(**named, recipe=name)
    # The rows and columns that read the element, at least.
    touched = {"x": (y[3], dw[:, 5]), "w": (y[:, 3], dx[:, 5]), "dy": (dx[3], dw[5])}[where]
    assert not any(part.isfinite().any() for part in touched)


MODES = {"mxfp8": ScaleCalculationMode.RCEIL, "mxfp8_floor": ScaleCalculationMode.FLOOR}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("spread", [0, 4])
def test_mxfp8_linear_equals_torchaos(name, spread):
    x, w, dy = tensors(128, 256, 192, torch.bfloat16)
    x, w, dy = (t * torch.logspace(-spread, spread, t.shape[1]).bfloat16() for t in (x, w, dy))
    ours = run(x, w, dy, recipe=name)
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = mx_mm.apply(
        *leaves, *[torch.float8_e4m3fn] * 3, 32, KernelPreference.EMULATED,
        MXFP8Dim0CastKernelChoice.TORCH, MXFP8Dim1CastKernelChoice.TORCH, MODES[name], False,
    )  # fmt: skip
    y.backward(dy)
    for actual, expected in zip(ours, (y, *(t.grad for t in leaves)), strict=True):
        assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)


DEQUANTIZED = RECIPES["nvfp4_mxfp8_dequantized"]


@pytest.mark.parametrize(
    ("recipe", "gemm", "target"),
    [
        ("nvfp4_mxfp8", "dgrad", 28.5),
        ("nvfp4_mxfp8", "wgrad", 28.5),
        # Quantized twice: 19.3 to 20.05 by where amax lies between two powers of two.
        (DEQUANTIZED, "wgrad", 19.5),
        (DEQUANTIZED.switched(weights_2d=False), "dgrad", 19.5),
        (DEQUANTIZED, "dgrad", 18.5),  # w in 16x16 blocks has 19.06 dB to begin with
    ],
)
def test_backward_windows(recipe, gemm, target):
    values = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        m, n, k = (512, 4096, 512) if gemm == "dgrad" else (4096, 512, 512)
        x, w, dy = (torch.randn(s, generator=generator) for s in ((m, k), (n, k), (m, n)))
        _, dx, dw = run(x, w, dy, recipe=recipe)
        values.append(sqnr(dx, dy @ w) if gemm == "dgrad" else sqnr(dw, dy.T @ x))
    assert abs(sum(values) / 5 - target) <= WINDOW_DB


def test_autocast_and_bias():
    x, w, dy = tensors()
    for name in QUANTIZED:
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        bias = torch.randn(128, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = linear(a, b, bias, recipe=name, backend="reference", key=KEY)
        assert y.dtype == torch.bfloat16
        y.backward(dy.bfloat16())
        assert a.grad.dtype == b.grad.dtype == torch.float32
        assert torch.equal(bias.grad.bfloat16(), dy.bfloat16().sum(0))


def test_switches():
    single = RECIPES["nvfp4_46"].switched(tensor_scale=False)
    assert single.fprop.left.format.name == single.dgrad.right.format.name == "nvfp4_46_single"
    assert single.dgrad.left.format.name == single.wgrad.left.format.name == "nvfp4_46"
    assert RECIPES["mxfp8"].switched(tensor_scale=False).formats == {"mxfp8"}
    mixed = RECIPES["nvfp4_mxfp8"].switched(sr=False, weights_2d=False)
    assert {f.rounding for g in mixed.gemms for f in (g.left, g.right)} == {"rtne"}
    assert mixed.fprop.right.block == (1, 16)
    x, w, dy = tensors()
    for recipe in (single, mixed):
        # Gradients of a mean over many tokens are this small, and must not become zeros.
        _, dx, dw = run(x, w, dy * 1e-7, recipe=recipe)
        assert relative_error(dx, dy * 1e-7 @ w) < 0.3
        assert relative_error(dw, dy.T * 1e-7 @ x) < 0.3


def test_specs_are_read_back():
    for recipe in RECIPES.values():
        for variant in (recipe, recipe.switched(tensor_scale=False)):
            for gemm in variant.gemms:
                assert OperandFormat.parse(str(gemm.left)) == gemm.left
                assert OperandFormat.parse(str(gemm.right)) == gemm.right


def test_square_mxfp8_weights_share_their_codes():
    x = OperandFormat(MXFP8, (1, 32))
    gemm = GemmFormat(x, OperandFormat(MXFP8, (32, 32)))
    recipe = Recipe("square", fprop=gemm, dgrad=gemm, wgrad=GemmFormat(x, x))
    assert recipe.shares_weight_codes
    x, w, dy = tensors()
    w_hat = dequantize(quantize(w, format="mxfp8", block=(32, 32)))
    dx = run(x, w, dy, recipe=recipe)[1]
    assert relative_error(dx, dequantize(quantize(dy, format="mxfp8")) @ w_hat) < 1e-6


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: GemmFormat(OperandFormat(), OperandFormat(MXFP8, (1, 32))), "differ in size"),
        (lambda: Recipe("r", dequantized=True), "be quantized"),
        (lambda: OperandFormat(MXFP8, (1, 16)), "use \\(1, 32\\)"),
    ],
)
def test_what_cannot_be_a_recipe(make, fragment):
    with pytest.raises(ConfigError, match=fragment):
        make()


def test_a_backend_without_a_format_is_refused():
    nvfp4_only = replace(BACKENDS["reference"], name="fast", formats=frozenset({"nvfp4"}))
    assert resolve(nvfp4_only, RECIPES["nvfp4_bf16"]) is nvfp4_only
    with pytest.raises(UnsupportedError, match="lacks the formats mxfp8.*reference"):
        linear(*tensors()[:2], recipe="nvfp4_mxfp8", backend=nvfp4_only)
