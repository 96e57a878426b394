"""Block formats as frozen data, and the signs of the random Hadamard transform (RHT).

A block format stores `code * block_scale * global_scale ~= x`: every scale here is a *decode*
scale. New formats are new records; nothing else in the package derives properties from a dtype.

Sources: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), section 2 and
appendix; TransformerEngine d0067d0d, `common/cast/nvfp4/core_nvfp4.cuh` (order of fp32 operations)
and `pytorch/custom_recipes/reference_nvfp4.py` (signs). MXFP8: OCP Microscaling Formats 1.0,
section 6.3, and cuBLAS, "1D block scaling" (scales rounded up). Four over six: arXiv 2512.02010.
"""

from dataclasses import dataclass, replace

import torch

BLOCK = 16
"""Elements that share an NVFP4 block scale along the contraction dim; size of the Hadamard matrix.
"""

RHT_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Diagonal of the RHT, the same on every layer, rank and step: x and dy must cancel in wgrad."""


@dataclass(frozen=True)
class BlockFormat:
    """A block-scaled element format.

    Attributes:
        name: Name used in recipes and reports.
        block: Elements per block scale along the contraction dim.
        element_max: Largest magnitude of an element code.
        scale_max: Largest block scale that the tensor's amax is mapped to.
        values: Magnitudes of the element codes, in code order; () for a torch dtype's own.
        code_dtype: Storage of the codes.
        codes_per_byte: Codes that share a byte of storage.
        scale_dtype: Storage of the block scales.
        scale_rounding: How a block scale becomes its dtype: "nearest", "up" or "down".
        tensor_scale: Whether an fp32 scale per tensor comes on top.
        block_targets: Code magnitudes that a block's amax may be mapped to; of several, the one
            with the smaller squared error.
    """

    name: str
    block: int
    element_max: float
    scale_max: float
    values: tuple[float, ...] = ()
    code_dtype: torch.dtype = torch.uint8
    codes_per_byte: int = 2
    scale_dtype: torch.dtype = torch.float8_e4m3fn
    scale_rounding: str = "nearest"
    tensor_scale: bool = True
    block_targets: tuple[float, ...] = (6.0,)

    def __hash__(self) -> int:
        """Of the name alone: kernels are looked up by their formats at every launch."""
        return hash(self.name)

    @property
    def encode_max(self) -> float:
        """Largest `code * block_scale`: the tensor's amax is mapped onto it."""
        return self.element_max * self.scale_max

    def single_level(self) -> "BlockFormat":
        """This format without the scale per tensor; itself where there is none."""
        if not self.tensor_scale:
            return self
        return replace(self, name=f"{self.name}_single", tensor_scale=False)


NVFP4 = BlockFormat(
    name="nvfp4",
    block=BLOCK,
    element_max=6.0,
    scale_max=448.0,
    values=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
)
"""E2M1 elements, E4M3 scale per 16 elements, fp32 scale per tensor."""

NVFP4_46 = replace(NVFP4, name="nvfp4_46", scale_max=256.0, block_targets=(6.0, 4.0))
"""NVFP4 with four-over-six block scaling: a block's amax becomes 6 or 4, whichever errs less.

The tensor's amax maps onto 6 * 256 and not 6 * 448: the block that holds it, scaled to 4, then
needs a scale of 384, which E4M3 has; from 448 it would need 672.
"""

MXFP8 = BlockFormat(
    name="mxfp8",
    block=32,
    element_max=448.0,
    scale_max=2.0**127,
    code_dtype=torch.float8_e4m3fn,
    codes_per_byte=1,
    scale_dtype=torch.float8_e8m0fnu,
    scale_rounding="up",
    tensor_scale=False,
    block_targets=(448.0,),
)
"""E4M3 elements, E8M0 scale (a power of two) per 32 elements, rounded up: nothing saturates."""

MXFP8_FLOOR = replace(MXFP8, name="mxfp8_floor", scale_rounding="down")
"""MXFP8 with scales rounded down, as in OCP's specification: a block's largest may saturate."""
