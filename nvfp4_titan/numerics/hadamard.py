"""Random Hadamard transform (RHT) over blocks of 16: diag(signs), Sylvester H16, divided by 4.

`t.reshape(-1, 16) @ (diag(signs) @ H16 / 4)`, bf16 in, fp32 inside, bf16 out. The transform is
orthogonal, so it cancels between the two operands of wgrad; it spreads outliers over their block.

Written as four butterfly stages in a fixed order, not as a matrix product, so that every device
adds in the same order and gives the same bits. The division comes first: it is exact (a power of
two), and sums then stay finite for inputs up to 8e37.

Source: NVIDIA arXiv 2509.25149, appendix C; signs of TransformerEngine d0067d0d (formats.py).
"""

import torch

from ..formats import BLOCK, RHT_SIGNS

_NEGATIVE = sum(1 << i for i, sign in enumerate(RHT_SIGNS) if sign < 0)
"""The signs as bits, so that any device can compute them without a copy from the host."""


def rht(t: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Apply the RHT to blocks of 16 along `dim`.

    Args:
        t: 2D floating tensor whose size along `dim` is a multiple of 16; rounded to bf16 first.
        dim: 0 or 1 (or negative).

    Returns:
        bf16 tensor of t's shape.
    """
    dim, t = dim % t.dim(), t.detach()
    rows, columns = t.shape
    negative = (_NEGATIVE >> torch.arange(BLOCK, device=t.device)) & 1
    signs = (1 - 2 * negative).to(torch.float32) / 4
    if dim == 0:
        inner, signs = columns, signs.view(1, BLOCK, 1)
        blocks = t.reshape(rows // BLOCK, BLOCK, columns)
    else:
        inner, signs = 1, signs.view(1, BLOCK, 1)
        blocks = t.reshape(rows * columns // BLOCK, BLOCK, 1)
    current = blocks.to(torch.bfloat16).to(torch.float32).mul_(signs)
    other = torch.empty_like(current)
    stride = 1
    while stride < BLOCK:
        shape = (-1, BLOCK // (2 * stride), 2, stride, inner)
        a, b = current.view(shape).unbind(2)
        if torch.compiler.is_compiling():  # which refuses to write into views
            current = torch.stack((a + b, a - b), dim=2).view_as(current)
        else:
            total, difference = other.view(shape).unbind(2)
            torch.add(a, b, out=total)
            torch.sub(a, b, out=difference)
            current, other = other, current
        stride *= 2
    return current.to(torch.bfloat16).view(rows, columns)
