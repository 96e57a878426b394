"""Block formats as frozen data, and the signs of the random Hadamard transform (RHT).

A block format stores `code * block_scale * global_scale ~= x`: every scale here is a *decode*
scale. New formats are new records; nothing else in the package derives properties from a dtype.

Sources: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), section 2 and
appendix; TransformerEngine d0067d0d, `common/cast/nvfp4/core_nvfp4.cuh` (order of fp32 operations)
and `pytorch/custom_recipes/reference_nvfp4.py` (signs).
"""

from dataclasses import dataclass

BLOCK = 16
"""Elements that share a block scale along the contraction dim; size of the Hadamard matrix."""

RHT_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Diagonal of the RHT, the same on every layer, rank and step: x and dy must cancel in wgrad."""


@dataclass(frozen=True)
class BlockFormat:
    """A block-scaled element format.

    Attributes:
        name: Name used in recipes and reports.
        block: Elements per block scale along the contraction dim.
        element_max: Largest magnitude of an element code.
        scale_max: Largest block scale.
        values: Magnitudes of the element codes, in code order.
    """

    name: str
    block: int
    element_max: float
    scale_max: float
    values: tuple[float, ...]

    @property
    def encode_max(self) -> float:
        """Largest `code * block_scale`: the tensor's amax is mapped onto it."""
        return self.element_max * self.scale_max


NVFP4 = BlockFormat(
    name="nvfp4",
    block=BLOCK,
    element_max=6.0,
    scale_max=448.0,
    values=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
)
"""E2M1 elements, E4M3 scale per 16 elements, fp32 scale per tensor."""
