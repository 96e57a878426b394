"""cuBLAS's GEMM with alpha in device memory: D = alpha * (A @ B), alpha applied in fp32.

torch multiplies only by an alpha that the host knows: reading the amaxes back would wait for the
device, and scaling the product afterwards would round twice, or write it twice. cublasGemmEx takes
alpha as a device pointer; called through ctypes on torch's own handle it runs on the current stream
with torch's workspace, waits for nothing and can be captured in a CUDA graph.

Source: cuBLAS documentation, cublasGemmEx, cublasSetPointerMode, cublasSetMathMode.
"""

import ctypes
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch

from ..errors import UnsupportedError

POINTER_MODE_HOST, POINTER_MODE_DEVICE = 0, 1
# Sums of parts are exchanged in fp32, not in the output's dtype.
MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16
COMPUTE_32F = 68
GEMM_DEFAULT = -1
OP_N, OP_T = 0, 1
DATA_TYPES = {torch.bfloat16: 14, torch.float32: 0}
"""cudaDataType of what a GEMM of bf16 operands can write."""


@cache
def library() -> ctypes.CDLL | None:
    """The cuBLAS that torch has loaded into this process; None where there is none."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    for line in maps.read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith("libcublas.so"):
            return _declare(ctypes.CDLL(path))
    return None


def _declare(cublas: ctypes.CDLL) -> ctypes.CDLL:
    handle = pointer = ctypes.c_void_p
    integer = ctypes.c_int
    matrix = (pointer, integer, integer)  # data, type, leading dim
    cublas.cublasGemmEx.argtypes = [
        *(handle, integer, integer, integer, integer, integer, pointer),
        *(*matrix, *matrix, pointer, *matrix, integer, integer),
    ]
    for mode in (cublas.cublasSetPointerMode_v2, cublas.cublasSetMathMode):
        mode.argtypes = [handle, integer]
    return cublas


def _check(status: int, call: str) -> None:
    if status != 0:
        raise RuntimeError(f"{call} failed with cuBLAS status {status}")


def gemm_arguments(
    a: torch.Tensor, b: torch.Tensor, a_transposed: bool, b_transposed: bool, sizes: tuple
) -> tuple:
    """How cuBLAS, which counts columns first, is told of a GEMM of row-major matrices.

    D (m, n) row-major is D.T (n, m) to cuBLAS, and D.T = B.T @ A.T, of matrices that it sees
    transposed already: B goes first, and what is stored transposed is transposed back.

    Args:
        a: (m, k) contiguous, or (k, m) if a_transposed; may be wider than the GEMM reads.
        b: (k, n) contiguous, or (n, k) if b_transposed; likewise.
        a_transposed: See a.
        b_transposed: See b.
        sizes: m, n, k.

    Returns:
        Operations, sizes, and both leading dims: opB, opA, n, m, k, ldB, ldA.
    """
    m, n, k = sizes
    op_a, op_b = (OP_T if flag else OP_N for flag in (a_transposed, b_transposed))
    return op_b, op_a, n, m, k, b.shape[1], a.shape[1]


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_transposed: bool,
    b_transposed: bool,
    sizes: tuple[int, int, int],
    alpha: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """(m, n) = alpha * (m, k) @ (k, n) with fp32 accumulation.

    Args:
        a: See `gemm_arguments`; bf16 on a GPU.
        b: Likewise.
        a_transposed: See `gemm_arguments`.
        b_transposed: See `gemm_arguments`.
        sizes: m, n, k, none of them 0.
        alpha: (2,) fp32 on the GPU: alpha and 0.
        out_dtype: bfloat16 or float32.

    Raises:
        UnsupportedError: no cuBLAS in this process.
    """
    cublas = library()
    if cublas is None:
        raise UnsupportedError("torch has loaded no cuBLAS here")
    op_b, op_a, n, m, k, ldb, lda = gemm_arguments(a, b, a_transposed, b_transposed, sizes)
    d = torch.empty((m, n), dtype=out_dtype, device=a.device)
    bf16, output = DATA_TYPES[torch.bfloat16], DATA_TYPES[out_dtype]
    alpha_pointer = alpha.data_ptr()
    # The guard costs as much as the call; devices seldom differ.
    current = a.device.index == torch.cuda.current_device()
    with nullcontext() if current else torch.cuda.device(a.device):
        # Also sets the handle's stream and workspace to torch's current ones, and its math mode:
        # that of this call need not be taken back. torch's pointer mode is the host's.
        handle = torch.cuda.current_blas_handle()
        _check(
            cublas.cublasSetMathMode(handle, MATH_DISALLOW_REDUCED_PRECISION_REDUCTION),
            "cublasSetMathMode",
        )
        _check(cublas.cublasSetPointerMode_v2(handle, POINTER_MODE_DEVICE), "cublasSetPointerMode")
        status = cublas.cublasGemmEx(
            *(handle, op_b, op_a, n, m, k, alpha_pointer),
            *(b.data_ptr(), bf16, ldb, a.data_ptr(), bf16, lda),
            *(alpha_pointer + 4, d.data_ptr(), output, n),
            *(COMPUTE_32F, GEMM_DEFAULT),
        )
        _check(cublas.cublasSetPointerMode_v2(handle, POINTER_MODE_HOST), "cublasSetPointerMode")
    _check(status, "cublasGemmEx")
    return d
