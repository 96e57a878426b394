"""Counter-based random bytes for stochastic rounding: Philox4x32-7 in plain integer arithmetic.

The same function of (key, counter) on every device and in a Triton kernel, so that SR depends on
nothing but what it rounds: no generator, no launch order, no tile shape, no rank.

Philox: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). Seven rounds pass
BigCrush there (ten are the authors' default, with margin); rounding noise needs no more.
Checked against Random123's known-answer vectors in tests/.

What one call covers: the 16 elements of a 1x16 block, one byte each (element j takes byte j % 4,
counted from the low end, of word j // 4).
"""

import torch

ROUNDS = 7
_MUL0, _MUL1 = 0xD2511F53, 0xCD9E8D57
_WEYL0, _WEYL1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words, key: tuple[int, int], rounds: int = ROUNDS) -> Words:
    """Four 32-bit random words per counter.

    Args:
        counter: Four int64 tensors that broadcast together, values in [0, 2**32).
        key: Two 32-bit integers.
        rounds: Philox rounds.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).

    Source: Random123 1.14 (known answers), Salmon et al. 2011.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2**64, which keeps all 64 bits; the masks undo the sign.
        p0, p1 = c0 * _MUL0, c2 * _MUL1
        c0, c1, c2, c3 = (
            (p1 >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(k0),
            p1.bitwise_and_(_MASK),
            (p0 >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(k1),
            p0.bitwise_and_(_MASK),
        )
        k0, k1 = (k0 + _WEYL0) & _MASK, (k1 + _WEYL1) & _MASK
    return c0, c1, c2, c3


def bf16_mantissa(amax: torch.Tensor) -> torch.Tensor:
    """The 7 mantissa bits of a non-negative tensor rounded to bf16, as int64.

    Without the exponent, a loss scaled by a power of two keeps its random bits; rounded to bf16, a
    last-bit difference between two shardings nearly always does too.
    """
    return amax.to(torch.bfloat16).view(torch.int16).to(torch.int64).bitwise_and_(0x7F)


def block_random_bytes(
    key: int,
    stream: int,
    amax: torch.Tensor,
    block_amax: torch.Tensor,
    row: torch.Tensor | None = None,
    column: torch.Tensor | None = None,
) -> torch.Tensor:
    """One uniform random byte per element of (R, B) blocks of 16.

    Counter: (row, block column, mantissas of amax and block amax, stream), all of the *global*
    operand, so that a shard draws what the whole would.

    Args:
        key: 64-bit key, from `sr_key`.
        stream: Which operand of which GEMM this is; 32 bits.
        amax: fp32, broadcasts to (R, B): amax of the operand that each block belongs to.
        block_amax: (R, B) fp32, amax of each element's block.
        row: (R,) int64 global index of each row; None counts from 0.
        column: (B,) int64 global index, in blocks, of each block column; None counts from 0.

    Returns:
        (R, B, 16) int16 in [0, 255].
    """
    device = block_amax.device
    rows, blocks = block_amax.shape
    row = torch.arange(rows, device=device) if row is None else row
    column = torch.arange(blocks, device=device) if column is None else column
    mantissas = bf16_mantissa(block_amax) | (bf16_mantissa(amax) << 7)
    counter = (row[:, None], column[None, :], mantissas, torch.full((), stream, device=device))
    words = philox4x32(counter, (key & _MASK, (key >> 32) & _MASK))
    packed = torch.stack([word.to(torch.int32) for word in words], dim=-1)
    # Little-endian: byte 0 of a word is its low end.
    return packed.view(torch.uint8).to(torch.int16)
