"""The Triton backend's ops without a GPU: shapes, tracing, choice of the backend."""

import subprocess
import sys

import pytest
import torch
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx

from nvfp4_titan.backends import BACKENDS, resolve
from nvfp4_titan.errors import UnsupportedError
from nvfp4_titan.training import NVFP4Linear, grouped_mm, key_tensor, linear

TRITON = BACKENDS["triton"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


def test_importing_the_package_imports_no_triton():
    program = "import sys, nvfp4_titan.training; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@no_gpu
def test_without_a_gpu_it_is_refused_and_auto_passes_it_over():
    with pytest.raises(UnsupportedError, match="no CUDA GPU; use backend = 'reference'"):
        resolve("triton")
    assert resolve("auto").name == "reference"


def test_tensors_on_the_cpu_go_to_the_reference():
    assert resolve("auto", device="cpu").name == "reference"
    with pytest.raises(UnsupportedError, match="the tensors are on the CPU"):
        resolve("triton", device="cpu")
    if sys.platform == "linux":
        with pytest.raises(UnsupportedError, match="move it to a GPU"):
            linear(torch.ones(16, 16), torch.ones(16, 16), backend=TRITON)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_are_known_without_running(dtype):
    options = {"dtype": dtype, "device": "meta", "requires_grad": True}
    x, w, experts = (torch.empty(s, **options) for s in ((33, 20), (24, 20), (3, 24, 20)))
    offs = torch.empty(3, dtype=torch.int32, device="meta")
    for weight, y in (
        (w, linear(x, w, backend=TRITON)),
        (experts, grouped_mm(x, experts.mT, offs, backend=TRITON)),
    ):
        assert y.shape == (33, 24) and y.dtype == dtype
        dx, dw = torch.autograd.grad(y.sum(), (x, weight))
        assert (dx.shape, dw.shape) == (x.shape, weight.shape) and dw.dtype == dtype


def count(graph, op: str) -> int:
    target = getattr(torch.ops.nvfp4_titan, op).default
    return sum(node.target is target for node in graph.nodes)


def test_layers_that_read_the_same_input_share_its_codes_when_compiled():
    a, b = (NVFP4Linear(32, 48, False, name=n, backend=TRITON, device="meta") for n in "ab")
    x = torch.randn(16, 32, requires_grad=True, device="meta")

    def step(x, wa, wb):
        y = linear(x, wa, backend=TRITON, key=a.key) + linear(x, wb, backend=TRITON, key=b.key)
        return torch.autograd.grad(y.sum(), (wa, wb))

    graph = make_fx(step)(x, a.weight, b.weight).graph
    merged = fx_graph_cse(graph)
    # Two weights, x twice or once, dy twice (it has the layer's key); values of weights are kept.
    assert count(graph, "triton_quantize") == 6 and count(merged, "triton_quantize") == 5
    assert count(graph, "triton_unpack") == 2 and count(merged, "triton_unpack") == 1


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_mxfp8", "nvfp4_bf16"])
def test_the_function_is_traced_whole(recipe):
    torch._dynamo.reset()
    module = NVFP4Linear(32, 48, name="x", backend=TRITON, device="meta", recipe=recipe)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(16, 32, device="meta", requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad.shape == x.shape


def test_a_key_is_asked_for_only_where_something_is_random():
    x, w = torch.empty(16, 32, device="meta"), torch.empty(16, 32, device="meta")
    graph = make_fx(lambda x, w: linear(x, w, backend=TRITON, key=key_tensor(0, "a")))(x, w).graph
    quantized = [n for n in graph.nodes if "quantize" in str(n.target)]
    assert len(quantized) == 2 and all(node.args[5] is None for node in quantized)


class Compiled:
    """Stands for what Triton compiles: notes what it is launched with."""

    launched = []

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((self, grid, args))


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_a_launch_is_compiled_once_for_each_alignment(monkeypatch):
    from nvfp4_titan.backends import triton_call

    class Kernel:
        arg_names = ["x", "y", "n", "C"]
        compilations = 0

        def __getitem__(self, grid):
            def compile_and_launch(*args, **options):
                self.compilations += 1
                return Compiled()

            return compile_and_launch

    monkeypatch.setattr(triton_call, "_compiled", {})
    monkeypatch.setattr(triton_call.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(Compiled, "launched", [])
    kernel, storage = Kernel(), torch.zeros(64)
    launch = triton_call.Launch(kernel, 7, {"C": 128}, num_warps=4)
    aligned, shifted = storage[:32], storage[1:33]
    for x in (aligned, aligned, shifted, shifted, aligned):
        launch(x, None, 5)
    assert kernel.compilations == 2 and len(Compiled.launched) == 3
    first, second, third = Compiled.launched
    assert first[0] is third[0] is not second[0]
    assert all(grid == (7, 1, 1) and args[2:] == (5, 128) for _, grid, args in Compiled.launched)
    # Other sizes that Triton does not compile apart share what is compiled.
    triton_call.Launch(kernel, 9, {"C": 128}, num_warps=4)(aligned, None, 7)
    assert kernel.compilations == 2 and Compiled.launched[-1][1] == (9, 1, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_plans_start_over_when_they_are_many(monkeypatch):
    from nvfp4_titan.backends.triton_call import Plans

    monkeypatch.setattr(Plans, "MOST", 2)
    plans = Plans()
    for key in range(3):
        assert plans.get((key,)) is None and plans.make((key,), str, key) == str(key)
    assert list(plans) == [(2,)]


def test_experts_that_read_the_same_tokens_share_their_codes_when_compiled():
    x = torch.empty(32, 32, device="meta", requires_grad=True)
    w1, w3 = (torch.empty(2, 48, 32, device="meta", requires_grad=True) for _ in range(2))
    offs = torch.empty(2, dtype=torch.int32, device="meta")

    keys = [key_tensor(0, name) for name in ("w1", "w3")]

    def step(x, w1, w3, offs):
        gate, up = (
            grouped_mm(x, w.mT, offs, backend=TRITON, key=key)
            for w, key in zip((w1, w3), keys, strict=True)
        )
        return torch.autograd.grad((gate.sigmoid() * up).sum(), (x, w1, w3))

    graph = make_fx(step)(x, w1, w3, offs).graph
    merged = fx_graph_cse(graph)
    # x twice or once, w1, w3, dy of each.
    assert count(graph, "triton_quantize") == 6 and count(merged, "triton_quantize") == 5
    assert count(graph, "triton_unpack") == 2 and count(merged, "triton_unpack") == 1
