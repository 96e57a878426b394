"""What a user has without this package: a compiled plain-PyTorch recipe, ModelOpt's fake-quant.

The plain recipe is what one writes by hand: the oracle's functions on whole tensors, bf16 GEMMs
over `lut[q] * S_b` with alpha applied in fp32, torch's generator for SR, all under torch.compile.
"""

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

import torch

from ..errors import UnsupportedError
from ..numerics.quantize import (
    block_amaxes,
    global_scale,
    prepare,
    quantize_blocks,
    scaled_values,
    tensor_amax,
)
from ..recipe import RECIPES, OperandFormat

RECIPE = RECIPES["nvfp4"]


def plain_values(
    t: torch.Tensor, fmt: OperandFormat, transpose: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 GEMM operand (contraction last) and decode scale of t (M, K)."""
    prepared = prepare(t, rht=fmt.rht, transpose=transpose)
    block_amax = block_amaxes(prepared, fmt.block[0])
    amax = tensor_amax(block_amax)
    random_byte = None
    if fmt.rounding == "sr":
        shape = (*block_amax.shape, 16)
        random_byte = torch.randint(0, 256, shape, dtype=torch.int16, device=t.device)
    packed = quantize_blocks(prepared, block_amax, amax, random_byte)
    return scaled_values(*packed, torch.bfloat16), global_scale(amax)


def _multiply(a: torch.Tensor, a_scale, b: torch.Tensor, b_scale) -> torch.Tensor:
    # (M, K) @ (K, N) -> (M, N)
    return (torch.mm(a, b, out_dtype=torch.float32) * (a_scale * b_scale)).to(torch.bfloat16)


class PlainRecipe(torch.autograd.Function):
    """The "nvfp4" recipe of a linear in plain PyTorch."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """(M, K), (N, K) -> (M, N), bf16."""
        ctx.save_for_backward(x, w)
        left, left_scale = plain_values(x, RECIPE.fprop.left, False)
        right, right_scale = plain_values(w, RECIPE.fprop.right, False)
        return _multiply(left, left_scale, right.T, right_scale)

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        """Dx (M, K) and dw (N, K)."""
        x, w = ctx.saved_tensors
        rows, rows_scale = plain_values(dy, RECIPE.dgrad.left, False)
        weight, weight_scale = plain_values(w, RECIPE.dgrad.right, False)
        dx = _multiply(rows, rows_scale, weight, weight_scale)
        cols, cols_scale = plain_values(dy, RECIPE.wgrad.left, True)
        tokens, tokens_scale = plain_values(x, RECIPE.wgrad.right, True)
        return dx, _multiply(cols, cols_scale, tokens.T, tokens_scale)


def compiled_linear() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The plain recipe under torch.compile."""
    return torch.compile(lambda x, w: PlainRecipe.apply(x, w), fullgraph=True)


def compiled_quantize(fmt: OperandFormat) -> Callable[[torch.Tensor], tuple]:
    """Quantizing to a GEMM operand, under torch.compile."""
    return torch.compile(lambda t: plain_values(t, fmt, False), fullgraph=True)


def modelopt_fake_quant() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """ModelOpt's fake-quant kernel: (M, K) bf16 and its amax (fp32 scalar) to (M, K).

    Raises:
        UnsupportedError: ModelOpt 0.47 is not installed whole, or has no kernel for this GPU.
    """
    # Releases move the kernel.
    if find_spec("modelopt") is None or not version("nvidia-modelopt").startswith("0.47."):
        raise UnsupportedError(
            "ModelOpt 0.47, which is compared with, is not installed: pip install "
            "nvidia-modelopt==0.47.0, or leave it out with --no-modelopt"
        )
    try:
        from modelopt.torch.kernels.quantization import gemm as kernels
    except ImportError as error:
        raise UnsupportedError(
            f"ModelOpt cannot be imported ({error}): install it with what it needs, or leave it "
            "out with --no-modelopt"
        ) from error

    if not kernels.IS_AVAILABLE or not hasattr(kernels, "fp4_fake_quant_block"):
        raise UnsupportedError("ModelOpt has no FP4 kernel for this GPU: use --no-modelopt")
    return kernels.fp4_fake_quant_block


class FakeQuantLinear(torch.autograd.Function):
    """A linear whose forward alone is fake-quantized, as ModelOpt trains."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, w: torch.Tensor, fake_quant: Callable) -> torch.Tensor:
        """(M, K), (N, K) -> (M, N); backward sees the fake-quantized operands."""
        x, w = (fake_quant(t, t.abs().amax().float()) for t in (x, w))
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        """Dx (M, K) and dw (N, K), straight through."""
        x, w = ctx.saved_tensors
        return dy @ w, dy.T @ x, None
