"""Model flavors of ours, and what torchtitan 0.2.2's train specs leave out.

Flavors are sized for convergence runs with the 2,048-token tokenizer: llama3 "150m" (139M
parameters) and "1b", deepseek_v3 "200m" (209M). "8B_8_layers" and "16B_6_layers" have the GEMMs of
torchtitan's 8B and 16B in fewer blocks, for two GPUs.
"""

from dataclasses import replace

from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs, deepseekv3_args
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args
from torchtitan.models.moe import MoEArgs
from torchtitan.protocols import train_spec
from torchtitan.tools.logging import logger

from .corpus import VOCAB_SIZE
from .validate import PlainAttentionValidator

LLAMA3_FLAVORS = {
    "150m": TransformerModelArgs(
        dim=1024, n_layers=12, n_heads=16, n_kv_heads=4, vocab_size=VOCAB_SIZE, rope_theta=500000
    ),
    "1b": TransformerModelArgs(
        dim=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim_multiplier=1.5,
        vocab_size=VOCAB_SIZE,
        rope_theta=500000,
    ),
    "8B_8_layers": replace(llama3_args["8B"], n_layers=8),
}

DEEPSEEK_V3_FLAVORS = {
    "200m": DeepSeekV3ModelArgs(
        vocab_size=VOCAB_SIZE,
        dim=768,
        inter_dim=2048,
        moe_inter_dim=512,
        n_layers=10,
        n_dense_layers=1,
        n_heads=12,
        moe_args=MoEArgs(
            num_experts=16,
            num_shared_experts=1,
            top_k=4,
            score_func="softmax",
            route_norm=False,
            score_before_experts=False,
        ),
        q_lora_rank=0,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        mscale=0.70,
    ),
    "16B_6_layers": replace(deepseekv3_args["16B"], n_layers=6),
}

MODELS = ("llama3", "llama4", "qwen3", "deepseek_v3", "gpt_oss")
"""torchtitan's language models, all convertible."""


def register() -> None:
    """Add flavors, and a validator where a train spec has none; a second call changes nothing."""
    llama3_args.update(LLAMA3_FLAVORS)
    deepseekv3_args.update(DEEPSEEK_V3_FLAVORS)
    for name in MODELS:
        spec = train_spec.get_train_spec(name)
        # That of llama4 passes the masks of flex attention, which its forward refuses without.
        lacks = spec.build_validator_fn is None or name == "llama4"
        if lacks and spec.build_validator_fn is not PlainAttentionValidator:
            with_validator = replace(spec, build_validator_fn=PlainAttentionValidator)
            train_spec.register_train_spec(name, with_validator)
            logger.debug(f"Added torchtitan's validator to the train spec of {name}")
