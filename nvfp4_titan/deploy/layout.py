"""What a quantized linear is called and how it is packed in a checkpoint, and its config entry.

The layouts are compressed-tensors' (0.20, Apache-2.0; what vLLM and transformers read):

    nvfp4-pack-quantized   weight_packed (N, K/2) uint8, weight_scale (N, K/16) e4m3,
                           weight_global_scale (1,) fp32 = 2688 / amax, which *encodes*: a weight is
                           code * (weight_scale / weight_global_scale); input_global_scale likewise
    pack-quantized         weight_packed (N, K/8) int32 of code + 8, weight_scale (N, K/group),
                           weight_shape (2,) int64
    float-quantized        weight (N, K) e4m3, weight_scale (N, 1)

A 16x16 block's scale is written once per row, which is why rows can be permuted (transformers' RoPE
orders those of q and k otherwise) without touching a code.
"""

import torch

from ..formats import NVFP4
from ..numerics.nvfp4 import tensor_encode
from .codecs import Codec, Encoded
from .recipes import DeployRecipe

SUFFIXES = (
    "weight_packed",
    "weight_scale",
    "weight_global_scale",
    "weight_shape",
    "input_global_scale",
    "weight_zero",
)


def to_layout(
    encoded: Encoded, recipe: DeployRecipe, input_amax: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of one linear by suffix of its name.

    Args:
        encoded: From the weight's codec.
        recipe: The DeployRecipe.
        input_amax: Static amax of x, where the recipe has one.
    """
    codes, scale = encoded["codes"], encoded["scale"]
    if recipe.layout == "nvfp4-pack-quantized":
        found = {
            "weight_packed": codes,
            "weight_scale": scale,
            "weight_global_scale": encoded.get("encode_scale", torch.ones(())).reshape(1),
        }
        if recipe.activation is not None:
            amax = torch.zeros(()) if input_amax is None else input_amax.float()
            found["input_global_scale"] = tensor_encode(amax, amax, NVFP4).reshape(1)
        return found
    if recipe.layout == "pack-quantized":
        shape = torch.tensor(codes.shape)
        return {"weight_packed": pack_int4(codes), "weight_scale": scale, "weight_shape": shape}
    if recipe.layout == "float-quantized":
        return {"weight": codes, "weight_scale": scale}
    names = {"codes": "weight_packed", "scale": "weight_scale", "zero": "weight_zero"}
    return {names[name]: tensor for name, tensor in encoded.items()}


def from_layout(tensors: dict[str, torch.Tensor], recipe: DeployRecipe) -> Encoded:
    """Inverse of `to_layout` for the weight: what the codec decodes."""
    if recipe.layout == "nvfp4-pack-quantized":
        found = {"codes": tensors["weight_packed"], "scale": tensors["weight_scale"]}
        if recipe.tensor_scale:
            found["encode_scale"] = tensors["weight_global_scale"].reshape(())
        return found
    if recipe.layout == "pack-quantized":
        codes = unpack_int4(tensors["weight_packed"])
        return {"codes": codes, "scale": tensors["weight_scale"]}
    if recipe.layout == "float-quantized":
        return {"codes": tensors["weight"], "scale": tensors["weight_scale"]}
    names = {"weight_packed": "codes", "weight_scale": "scale", "weight_zero": "zero"}
    return {names[name]: tensor for name, tensor in tensors.items()}


def amax_of(global_scale: torch.Tensor) -> torch.Tensor:
    """fp32 () amax behind a stored global scale, to a last bit."""
    return torch.div(torch.full_like(global_scale, NVFP4.encode_max), global_scale).reshape(())


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """(N, K) int8 in [-8, 7] to (N, K / 8) int32, the first code in the lowest bits."""
    nibbles = (codes + 8).to(torch.uint8)
    return (nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).contiguous().view(torch.int32)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_int4`."""
    nibbles = packed.contiguous().view(torch.uint8)
    codes = torch.stack((nibbles & 0xF, nibbles >> 4), dim=-1).flatten(-2)
    return codes.to(torch.int8) - 8


def quantization_config(recipe: DeployRecipe, ignore: list[str]) -> dict:
    """The `quantization_config` of a config.json.

    Args:
        recipe: A recipe with a layout.
        ignore: Names of linears that are not quantized.
    """
    group = {"targets": ["Linear"], "weights": _weights(recipe), "format": recipe.layout}
    group["input_activations"] = recipe.activation and _activations(recipe)
    return {
        "quant_method": "compressed-tensors",
        "format": recipe.layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def _base(codec: Codec) -> dict:
    return {"num_bits": codec.bits, "type": codec.type, "symmetric": True}


def _weights(recipe: DeployRecipe) -> dict:
    codec = recipe.weight
    if recipe.layout == "nvfp4-pack-quantized":
        return _base(codec) | _NVFP4_GROUP | {"dynamic": False}
    if recipe.layout == "float-quantized":
        return _base(codec) | {"strategy": "channel", "dynamic": False}
    return _base(codec) | {"strategy": "group", "group_size": codec.multiple, "dynamic": False}


def _activations(recipe: DeployRecipe) -> dict:
    codec = recipe.activation
    if recipe.layout == "nvfp4-pack-quantized":
        return _base(codec) | _NVFP4_GROUP | {"dynamic": "local"}
    return _base(codec) | {"strategy": "token", "dynamic": True}


_NVFP4_GROUP = {
    "strategy": "tensor_group",
    "group_size": NVFP4.block,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}
