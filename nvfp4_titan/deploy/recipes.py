"""Deploy recipes as data: one registry for QAT, finalize and evaluate.

NVFP4 and MXFP8 with quantized activations run as training recipes whose forward is quantized and
whose backward multiplies, in high precision, what the forward did (straight-through): through this
project's backends, on any device, experts included. The trained 16x16 scales and the order of fp32
operations are training's (numerics/nvfp4.py), and not those of torchao's NVFP4Tensor, whose scales
per 1x16 block, lower clamp and NaN for all-zero tensors differ: a checkpoint then holds the very
codes that the run computed with. The layout is the same for both.

The others fake-quantize w (and x) with a codec and multiply in high precision.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import ConfigError
from ..formats import BLOCK, MXFP8, NVFP4
from ..recipe import GemmFormat, OperandFormat, Recipe
from .codecs import (
    FLOAT8,
    FLOAT8_TOKEN,
    FP8_MX,
    INT8_TOKEN,
    MXFP4,
    Codec,
    int4_minimum,
    int4_of_float8,
    int_group,
    nvfp4,
)


@dataclass(frozen=True)
class DeployRecipe:
    """How a deployed model's linears are quantized.

    Attributes:
        name: Key in `DEPLOY_RECIPES`.
        gemm: The training recipe that QAT runs in; None for a pair of codecs.
        weight: The weights' codec.
        activation: The activations' codec, None for weight-only.
        layout: compressed-tensors' name of the checkpoint's layout; None where it has none.
        tensor_scale: Whether there are scales per tensor, which linears of one input may share.
    """

    name: str
    gemm: Recipe | None
    weight: Codec
    activation: Codec | None
    layout: str | None
    tensor_scale: bool = False

    def __reduce__(self):
        # Codecs hold functions that pickle does not find: a model's file names its recipe.
        if DEPLOY_RECIPES.get(self.name) is self:
            return get_deploy_recipe, (self.name,)
        return super().__reduce__()

    @property
    def static_activation(self) -> bool:
        """Whether the activations' scale per tensor is calibrated, and stored."""
        return self.tensor_scale and self.activation is not None

    @property
    def experts(self) -> bool:
        """Whether routed experts can be quantized too."""
        return self.gemm is not None


def _forward(name: str, x: OperandFormat, w: OperandFormat) -> Recipe:
    return Recipe(name, fprop=GemmFormat(x, w), dequantized=True)


def _nvfp4(name: str, fmt=NVFP4) -> DeployRecipe:
    gemm = _forward(f"qat_{name}", OperandFormat(fmt), OperandFormat(fmt, (BLOCK, BLOCK)))
    codecs = nvfp4(fmt, BLOCK), nvfp4(fmt)
    return DeployRecipe(name, gemm, *codecs, "nvfp4-pack-quantized", fmt.tensor_scale)


def _mxfp8() -> DeployRecipe:
    operand = OperandFormat(MXFP8, (1, MXFP8.block))
    return DeployRecipe("mxfp8", _forward("qat_mxfp8", operand, operand), FP8_MX, FP8_MX, None)


DEPLOY_RECIPES: Mapping[str, DeployRecipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            _nvfp4("nvfp4"),
            _nvfp4("nvfp4_single", NVFP4.single_level()),
            DeployRecipe(
                "nvfp4_weight_only", None, nvfp4(NVFP4, BLOCK), None, "nvfp4-pack-quantized", True
            ),
            DeployRecipe(
                "int8_act_int4_weight", None, int_group(4, 32), INT8_TOKEN, "pack-quantized"
            ),
            DeployRecipe("int4_weight_only", None, int4_minimum(128), None, None),
            DeployRecipe("float8_act_float8_weight", None, FLOAT8, FLOAT8_TOKEN, "float-quantized"),
            DeployRecipe(
                "float8_act_int4_weight", None, int4_of_float8(128), FLOAT8_TOKEN, "pack-quantized"
            ),
            _mxfp8(),
            DeployRecipe("mxfp4", None, MXFP4, MXFP4, None),
        )
    }
)
"""Recipes by the name that TOMLs and scripts take.

    nvfp4                     w in 16x16, x in 1x16 blocks, a scale per tensor each
    nvfp4_single              the same without the scales per tensor
    nvfp4_weight_only         w alone
    int8_act_int4_weight      w in groups of 32, x per token, both symmetric
    int4_weight_only          w in groups of 128, asymmetric
    float8_act_float8_weight  w per row, x per token
    float8_act_int4_weight    w in groups of 128 after a float8 rounding, x per token
    mxfp8, mxfp4              w and x in 1x32 blocks, scales rounded up
"""


def get_deploy_recipe(recipe: str | DeployRecipe) -> DeployRecipe:
    """A recipe by name, or the recipe itself.

    Raises:
        ConfigError: the name is not in `DEPLOY_RECIPES`.
    """
    if isinstance(recipe, DeployRecipe):
        return recipe
    if recipe not in DEPLOY_RECIPES:
        names = ", ".join(DEPLOY_RECIPES)
        raise ConfigError(f"deploy recipe {recipe!r} is unknown: use one of {names}")
    return DEPLOY_RECIPES[recipe]
