"""The native backend without a Blackwell GPU: gates, layout, the whole call path by stand-ins."""

import sys
from dataclasses import replace

import pytest
import torch
from backend_checks import KEY, TOKEN_FORMATS, draw, gemms
from hypothesis import given, settings
from hypothesis import strategies as st
from support import differing
from torch._functorch.compile_utils import fx_graph_cse
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torchao.prototype.mx_formats.utils import to_blocked as torchao_to_blocked

from nvfp4_titan import RECIPES
from nvfp4_titan.backends import BACKENDS, OperandUse, native, native_gemm, resolve
from nvfp4_titan.backends.native import NATIVE, STAND_IN
from nvfp4_titan.distributed import amax_in_dtypes, gathered_operand
from nvfp4_titan.errors import ConfigError, UnsupportedError
from nvfp4_titan.numerics import dequantize
from nvfp4_titan.numerics.grouped import dequantize_tokens
from nvfp4_titan.recipe import OperandFormat
from nvfp4_titan.training import NVFP4Linear, grouped_mm, linear

REFERENCE = BACKENDS["reference"]
W = OperandFormat(block=(16, 16))
SIZES = st.integers(1, 150)
# The stand-in multiplies padding too: below 16 rows or columns a CPU's GEMM may then take another
# order of sums than for the reference.
WIDE = st.integers(16, 150)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


def run(backend, x, w, dy, offs=None, recipe="nvfp4"):
    """y, dx, dw."""
    options = {"recipe": recipe, "backend": backend, "key": KEY}

    def function(x, w):
        if offs is None:
            return linear(x, w, **options)
        return grouped_mm(x, w.transpose(1, 2), offs, **options)

    return gemms(function, x, w, dy)


def check_equal(x, w, dy, offs=None, recipe="nvfp4"):
    """All three GEMMs of the native call path give the reference's bits."""
    mine, wanted = (run(b, x, w, dy, offs, recipe) for b in (STAND_IN, REFERENCE))
    for a, b in zip(mine, wanted, strict=True):
        assert a.dtype == b.dtype and differing(a, b) == 0


# Gates


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((8, 0), False), ((9, 0), False), ((10, 0), True), ((10, 3), True), ((12, 0), True)],
)
def test_native_runs_from_blackwell_on(capability, runs):
    reason = native.refusal(capability, "NVIDIA GPU")
    assert (reason is None) == runs
    assert runs or "has no FP4 tensor cores" in reason and "backend = 'triton'" in reason


def pick(x):
    """1 where auto picks native."""
    return x + (resolve("auto", RECIPES["nvfp4"], "cuda").name == "native")


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_native_is_picked_by_the_gpu_that_is_there(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GPU")
    assert pick(0) == (capability == (10, 0))


@pytest.mark.parametrize("reason", ["", "it is old"])
def test_native_is_picked_by_the_gpu_that_is_there_when_compiled(reason, monkeypatch):
    # A GPU cannot be feigned here: dynamo would start it.
    assert native._refusal_here._dynamo_marked_constant

    def here():
        torch._dynamo.graph_break()  # not traced
        return reason

    here._dynamo_marked_constant = True
    monkeypatch.setattr(native, "_refusal_here", here)
    monkeypatch.setattr(native, "TRITON", replace(BACKENDS["triton"], unavailable=lambda _: None))
    torch._dynamo.reset()
    compiled = torch.compile(pick, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())).item() == (not reason)


@no_gpu
@pytest.mark.parametrize("name", ["native", "native_software_sr"])
def test_native_is_refused_without_a_gpu_and_auto_passes_it_over(name):
    with pytest.raises(UnsupportedError, match="no CUDA GPU|triton is not installed"):
        resolve(name)
    assert resolve("auto").name == "reference"


def test_native_is_refused_for_tensors_on_the_cpu():
    if sys.platform == "linux":
        with pytest.raises(UnsupportedError, match="the tensors are on the CPU"):
            resolve("native", device="cpu")
    with pytest.raises(UnsupportedError, match="move it to a GPU"):
        linear(torch.ones(16, 16), torch.ones(16, 16), backend=NATIVE)


def test_native_names_the_format_that_it_lacks():
    with pytest.raises(UnsupportedError, match="lacks the formats mxfp8"):
        resolve(NATIVE, RECIPES["mxfp8"])


def test_native_grouped_gemms_name_what_torch_lacks():
    def missing(*args, **kwargs):
        raise NotImplementedError("nvfp4 grouped gemm is not supported without MSLK")

    x, offs = torch.randn(16, 64), torch.tensor([16], dtype=torch.int32)
    (a, _), (b, _) = (
        STAND_IN.quantize(t, OperandUse(OperandFormat(), 0), None, offs=o)
        for t, o in ((x, offs), (x[None], None))
    )
    operands = [native_gemm.GemmOperand(o.codes, o.block_scale, o.amax) for o in (a, b)]
    gemms = replace(native_gemm.TORCH, grouped=missing)
    with pytest.raises(UnsupportedError, match="this build of torch has no grouped NVFP4 GEMM"):
        native_gemm.multiply_groups(gemms, *operands, offs, torch.bfloat16)
    with pytest.raises(UnsupportedError, match="writes bfloat16, not torch.float32"):
        native_gemm.multiply_groups(gemms, *operands, offs, torch.float32)


@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (11, 0), (12, 0)])
def test_native_grouped_gemms_are_refused_where_torch_has_none(capability):
    reason = native_gemm.grouped_refusal(capability)
    assert (reason is None) == (capability[0] == 10)
    assert reason is None or "backend = 'triton'" in reason


# Layout


@settings(max_examples=8, deadline=None, derandomize=True)
@given(SIZES, SIZES, st.sampled_from(TOKEN_FORMATS))
def test_native_operands_are_the_oracles_in_torchaos_layout(rows, columns, fmt):
    t = draw((rows, columns), torch.bfloat16)
    uses = (OperandUse(fmt, 1), OperandUse(fmt, 4))
    both = (b.quantize(t, *uses, KEY) for b in (STAND_IN, REFERENCE))
    for mine, wanted in zip(*both, strict=True):
        assert mine.K == wanted.K and torch.equal(mine.amax, wanted.amax)
        width = wanted.codes.shape[1]
        assert mine.codes.shape[1] % 32 == 0 and not mine.codes[:, width:].any()
        assert torch.equal(mine.codes[:, :width], wanted.codes)
        plain = torch.nn.functional.pad(
            wanted.block_scale.view(torch.uint8), (0, mine.codes.shape[1] // 8 - width // 8)
        )
        theirs = torchao_to_blocked(plain).flatten()
        assert torch.equal(mine.block_scale.view(torch.uint8), theirs)
        assert torch.equal(dequantize(mine), dequantize(wanted))


@pytest.mark.parametrize("shape", [(130, 100), (3, 33, 20), (128, 1)])
def test_native_transposed_weights_are_those_of_the_transposed_weight(shape):
    w = draw(shape, torch.bfloat16)
    (plain, _), (expected, _) = (
        STAND_IN.quantize(t.contiguous(), OperandUse(W, 0), None) for t in (w, w.mT)
    )
    mine = native.ops.transpose(plain.codes, plain.block_scale, shape[-1], "stand_in")
    assert torch.equal(mine[0], expected.codes) and differing(mine[1], expected.block_scale) == 0


def test_native_dequantizes_groups():
    offs = torch.tensor([5, 5, 140], dtype=torch.int32)
    t = draw((150, 40), torch.bfloat16)
    use = OperandUse(OperandFormat(), 0)
    mine, wanted = (
        dequantize_tokens(b.quantize(t, use, None, offs=offs)[0], offs)
        for b in (STAND_IN, REFERENCE)
    )
    assert torch.equal(mine, wanted)


# The call path


@settings(max_examples=8, deadline=None, derandomize=True)
@given(WIDE, WIDE, WIDE, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_native_linear_gives_the_references_bits(m, k, n, dtype):
    check_equal(*(draw(shape, dtype) for shape in ((m, k), (n, k), (m, n))))


RECIPE_NAMES = ("nvfp4_bf16", "nvfp4_bf16_original", "bf16_nvfp4")


@pytest.mark.parametrize(
    "recipe",
    [*(RECIPES[name] for name in RECIPE_NAMES), RECIPES["nvfp4"].switched(weights_2d=False)],
    ids=lambda recipe: recipe.name,
)
def test_native_recipes_give_the_references_bits(recipe):
    offs = torch.tensor([0, 33, 70], dtype=torch.int32)
    check_equal(
        *(draw(shape, torch.float32) for shape in ((70, 50), (40, 50), (70, 40))), None, recipe
    )
    shapes = ((72, 48), (3, 32, 48), (72, 32))
    check_equal(*(draw(shape, torch.bfloat16) for shape in shapes), offs, recipe)


@pytest.mark.parametrize("shape", [(0, 16, 16), (1, 1, 1), (5, 95, 1), (33, 1, 7)])
def test_native_narrow_gemms_differ_in_the_order_of_sums_alone(shape):
    m, k, n = shape
    tensors = [draw(shape, torch.float32) for shape in ((m, k), (n, k), (m, n))]
    both = (run(b, *tensors) for b in (STAND_IN, REFERENCE))
    for mine, wanted in zip(*both, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6 * float(wanted.norm()))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.lists(st.just(0) | WIDE, min_size=1, max_size=4), WIDE, WIDE)
def test_native_grouped_gives_the_references_bits(sizes, k, n):
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    m = sum(sizes) + 3
    check_equal(*(draw(s, torch.float32) for s in ((m, k), (len(sizes), n, k), (m, n))), offs)


def test_native_groups_do_not_see_their_neighbours():
    offs = torch.tensor([3, 10, 14], dtype=torch.int32)
    x, w, dy = (draw(shape, torch.float32) for shape in ((16, 16), (3, 16, 16), (16, 16)))
    before = run(STAND_IN, x, w, dy, offs)
    x[6], dy[7], x[14:], dy[14:] = (float(v) for v in ("nan", "inf", "nan", "inf"))
    after = run(STAND_IN, x, w, dy, offs)
    for rows, e in ((slice(0, 3), 0), (slice(10, 14), 2)):
        assert torch.equal(before[0][rows], after[0][rows])
        assert torch.equal(before[1][rows], after[1][rows])
        assert torch.equal(before[2][e], after[2][e])
    assert not after[2][1].isfinite().any() and not after[0][14:].any()


def test_native_multiplies_weights_that_fsdp_gathered_in_codes():
    x, w = draw((20, 37), torch.float32), draw((32, 37), torch.float32)
    use, amax = OperandUse(W, 0), w.abs().max()
    shards = [STAND_IN.quantize(s, use, None, amax=amax.expand(2))[0] for s in w.chunk(2)]
    codes = torch.cat([s.codes for s in shards])
    scale = torch.cat([s.plain_scale[::16].view(torch.uint8) for s in shards])
    scale, amax = scale.view(torch.float8_e4m3fn), amax_in_dtypes(amax)
    gathered = gathered_operand(codes, scale, amax, 37, W, w.dtype)
    whole = STAND_IN.quantize(w, use, None)[0]
    rows = STAND_IN.quantize(x, OperandUse(OperandFormat(), 0), None)[0]
    results = [STAND_IN.mm(rows, b, 32, torch.float32) for b in (gathered, whole)]
    assert torch.equal(*results)
    dy = STAND_IN.quantize(draw((20, 32), torch.float32), OperandUse(OperandFormat(), 0), None)[0]
    results = [STAND_IN.mm(dy, b, 37, torch.float32, b_transposed=True) for b in (gathered, whole)]
    assert torch.equal(*results)


def test_native_stand_in_refuses_what_torch_refuses():
    a = STAND_IN.quantize(draw((16, 64), torch.float32), OperandUse(W, 0), None)[0]
    good = native_gemm.GemmOperand(a.codes, a.block_scale, a.amax)
    short = replace(good, scale=good.scale[:-4])
    odd = replace(good, codes=good.codes[:15])
    for left, right in ((short, good), (good, short), (good, odd)):
        with pytest.raises(ConfigError, match="would refuse"):
            native_gemm.multiply(native_gemm.Gemms(*_stand_ins()), left, right, torch.bfloat16)


def _stand_ins():
    gemms = native.ops.STAND_IN
    return gemms.plain, gemms.grouped, gemms.grouped_dtypes


# Tracing


@pytest.mark.parametrize("backend", [NATIVE, STAND_IN], ids=lambda backend: backend.name)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_native_shapes_are_known_without_running(backend, device):
    with FakeTensorMode(allow_non_fake_inputs=True):
        options = {"dtype": torch.bfloat16, "device": device, "requires_grad": True}
        x, w, experts = (torch.empty(s, **options) for s in ((33, 20), (24, 20), (3, 24, 20)))
        offs = torch.empty(3, dtype=torch.int32, device=device)
        for weight, y in (
            (w, linear(x, w, backend=backend)),
            (experts, grouped_mm(x, experts.mT, offs, backend=backend)),
        ):
            assert y.shape == (33, 24) and y.dtype == torch.bfloat16
            dx, dw = torch.autograd.grad(y.sum(), (x, weight))
            assert (dx.shape, dw.shape) == (x.shape, weight.shape)


def test_native_fake_operands_have_the_real_ones_shapes():
    offs = torch.tensor([5, 20], dtype=torch.int32)
    fmt = str(OperandFormat(rht=True))
    for t, ends in (
        (torch.ones(33, 70), None),
        (torch.ones(33, 70), offs),
        (torch.ones(2, 33, 70), None),
    ):
        args = (ends, fmt, fmt, [0, 0], None, None, [0, 0], "stand_in")
        real = native.ops.quantize(t, *args)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = native.ops.quantize(mode.from_tensor(t), *args)
        assert [(o.shape, o.dtype) for o in fake] == [(o.shape, o.dtype) for o in real]


@pytest.mark.parametrize("shape", [(33, 20, 24), (1, 64, 16), (512, 576, 10944)])
def test_native_gemms_pass_torchs_own_checks(shape, monkeypatch):
    """Forward and backward, through the checks of torch's own meta kernel."""
    m, k, n = shape
    calls = []

    def traced(a_codes, a_scale, a_amax, b_codes, b_scale, b_amax, out_dtype, mode):
        a = native_gemm.GemmOperand(a_codes, a_scale, a_amax)
        b = native_gemm.whole_columns(native_gemm.GemmOperand(b_codes, b_scale, b_amax))
        calls.append(native_gemm.multiply(native_gemm.TORCH, a, b, out_dtype).shape)
        return a_codes.new_empty((a_codes.shape[0], b_codes.shape[0]), dtype=out_dtype)

    monkeypatch.setattr(native.ops, "mm", traced)
    options = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    x, w = (torch.empty(s, **options) for s in ((m, k), (n, k)))
    linear(x, w, backend=NATIVE).sum().backward()
    up = {size: -(-size // 16) * 16 for size in shape}
    assert calls == [(m, up[n]), (m, up[k]), (n, up[k])]


def test_native_gemms_have_the_strides_that_torch_asks_of_a_gpu():
    # Beyond what it checks on the meta device; no operation runs on a fake GPU without a real one.
    fields = {"codes": (torch.uint8, (48, 32)), "scale": (torch.float8_e4m3fn, (128 * 4,))}
    with FakeTensorMode():
        tensors = {
            name: torch.empty(shape, dtype=dtype, device="cuda")
            for name, (dtype, shape) in fields.items()
        }
        operand = _Fake(**tensors, amax=torch.empty((), device="cuda"))
        y = native_gemm.multiply(native_gemm.TORCH, operand, operand, torch.bfloat16)
    assert y.shape == (48, 48)


class _Fake(native_gemm.GemmOperand):
    def scales(self, *shape):
        return [self.scale, self.amax]


def test_native_is_compiled_without_graph_breaks():
    torch._dynamo.reset()
    module = NVFP4Linear(32, 48, name="x", backend=NATIVE, device="meta")
    x = torch.randn(16, 32, device="meta", requires_grad=True)
    torch.compile(module, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert x.grad.shape == x.shape

    @torch.compile(backend="aot_eager", fullgraph=True)
    def experts(x, w, offs):
        return grouped_mm(x, w.mT, offs, backend=STAND_IN, key=KEY)

    args = (draw((40, 32), torch.float32), draw((2, 16, 32), torch.float32))
    offs = torch.tensor([9, 36], dtype=torch.int32)
    assert torch.equal(
        experts(*args, offs), grouped_mm(args[0], args[1].mT, offs, backend=STAND_IN, key=KEY)
    )


def test_native_layers_share_the_codes_of_one_input_when_compiled():
    def step(x, wa, wb):
        y = linear(x, wa, backend=NATIVE) + linear(x, wb, backend=NATIVE)
        return torch.autograd.grad(y.sum(), (x, wa, wb))

    x, wa, wb = (torch.randn(16, 32, device="meta", requires_grad=True) for _ in range(3))
    graph = make_fx(step)(x, wa, wb).graph
    target = torch.ops.nvfp4_titan.native_quantize.default
    counts = [sum(n.target is target for n in g.nodes) for g in (graph, fx_graph_cse(graph))]
    # Two weights, x twice or once, dy twice (it has the layer's key).
    assert counts == [6, 5]
