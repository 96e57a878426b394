"""How cuBLAS is called, without one: a stand-in that multiplies as its documentation says."""

import ctypes
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from nvfp4_titan.backends import cublas
from nvfp4_titan.errors import UnsupportedError


def column_major(data: np.ndarray, ld: int, rows: int, columns: int, op: int) -> np.ndarray:
    """op(A) (rows, columns) of a column-major matrix with leading dim ld in flat memory."""
    stored = (rows, columns) if op == cublas.OP_N else (columns, rows)
    strides = (data.itemsize, ld * data.itemsize)
    matrix = np.lib.stride_tricks.as_strided(data, stored, strides)
    return matrix if op == cublas.OP_N else matrix.T


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_arguments_describe_the_gemm(a_transposed, b_transposed):
    m, n, k = 3, 5, 4
    a, b = torch.randn(m, k), torch.randn(k, n)
    # Stored wider than the GEMM reads, as padded operands are.
    stored_a = torch.nn.functional.pad(a.T if a_transposed else a, (0, 2))
    stored_b = torch.nn.functional.pad(b.T if b_transposed else b, (0, 3))
    op_b, op_a, rows, columns, inner, ldb, lda = cublas.gemm_arguments(
        stored_a, stored_b, a_transposed, b_transposed, (m, n, k)
    )
    left = column_major(stored_b.numpy().ravel(), ldb, rows, inner, op_b)
    right = column_major(stored_a.numpy().ravel(), lda, inner, columns, op_a)
    # cuBLAS writes (n, m) column-major: (m, n) row-major.
    assert np.allclose((left @ right).T, (a @ b).numpy(), atol=1e-6)


class Library:
    """Notes calls; its GEMM fails."""

    def __init__(self):
        self.calls = []

    def cublasSetMathMode(self, handle, mode):  # noqa: N802
        self.calls.append(("math", mode))
        return 0

    def cublasSetPointerMode_v2(self, handle, mode):  # noqa: N802
        self.calls.append(("pointer", mode))
        return 0

    def cublasGemmEx(self, *args):  # noqa: N802
        self.calls.append(("gemm", len(args)))
        return 13


def test_the_pointer_mode_is_restored_when_the_call_fails(monkeypatch):
    library = Library()
    monkeypatch.setattr(cublas, "library", lambda: library)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    with pytest.raises(RuntimeError, match="cublasGemmEx failed with cuBLAS status 13"):
        cublas.gemm(*torch.ones(2, 2, 2), False, False, (2, 2, 2), torch.ones(2), torch.float32)
    assert library.calls == [("math", 16), ("pointer", 1), ("gemm", 19), ("pointer", 0)]


def test_a_failing_call_raises():
    with pytest.raises(RuntimeError, match="cublasX failed with cuBLAS status 13"):
        cublas._check(13, "cublasX")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch brings cuBLAS")
def test_a_torch_without_cublas_is_refused():
    assert cublas.library() is None
    with pytest.raises(UnsupportedError, match="no cuBLAS"):
        cublas.gemm(*torch.ones(2, 2, 2), False, False, (2, 2, 2), torch.ones(2), torch.float32)


def test_declarations_take_what_is_passed():
    calls = []

    class Function:
        argtypes = None

        def __call__(self, *args):
            calls.append(len(args))

    class Fake:
        def __getattr__(self, name):
            self.__dict__[name] = Function()
            return self.__dict__[name]

    fake = cublas._declare(Fake())
    assert len(fake.cublasGemmEx.argtypes) == 19
    assert fake.cublasSetMathMode.argtypes == [ctypes.c_void_p, ctypes.c_int]
