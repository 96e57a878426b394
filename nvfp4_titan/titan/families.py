"""The models that can be finalized: torchtitan's classes, and their config.json.

A Hugging Face config.json is written from torchtitan's model args, and read into them. Experts are
(E, N, K) parameters in torchtitan and a linear each in a checkpoint: here they are a linear each
too (`SplitExperts`), named `layers.N.moe.experts.E.w1`, so that one expert is quantized, calibrated
and evaluated as any other linear is.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass

import torch
from torch import nn
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, DeepSeekV3ModelArgs
from torchtitan.models.deepseek_v3.model.state_dict_adapter import DeepSeekV3StateDictAdapter
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.models.moe import FeedForward, MoE, MoEArgs
from torchtitan.protocols.model import BaseModelArgs

from ..errors import UnsupportedError

FUSED = (("wq", "wk", "wv"), ("w1", "w3"), ("wq_a", "wkv_a"))
"""Linears of one parent that inference engines run as one GEMM (vLLM: qkv_proj, gate_up_proj, w13
of experts, fused_qkv_a_proj), with one scale per tensor for all of them."""


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: torchtitan's name.
        hf_type: `model_type` of its config.json.
        architecture: Its class in transformers.
        model: torchtitan's model class.
        args: Its args class.
        adapter: torchtitan's state dict adapter.
        to_config: Args to the family's part of a config.json.
        from_config: A config.json to args.
    """

    name: str
    hf_type: str
    architecture: str
    model: type[nn.Module]
    args: type[BaseModelArgs]
    adapter: type
    to_config: Callable[[BaseModelArgs], dict]
    from_config: Callable[[dict], BaseModelArgs]


class SplitExperts(nn.ModuleList):
    """Routed experts with linears of their own; takes the place of torchtitan's GroupedExperts."""

    def __init__(self, dim: int, hidden: int, count: int):
        super().__init__(FeedForward(dim, hidden) for _ in range(count))
        self.num_experts = count

    def forward(self, x: torch.Tensor, num_tokens_per_expert: torch.Tensor) -> torch.Tensor:
        """(M, dim) tokens, sorted by expert, to the same; rows of no expert give zeros.

        Args:
            x: (M, dim).
            num_tokens_per_expert: (E,) counts, M or fewer in all.
        """
        counts = num_tokens_per_expert.int().tolist()
        parts = x[: sum(counts)].split(counts)
        done = [
            expert(part) if len(part) else part for expert, part in zip(self, parts, strict=True)
        ]
        return torch.cat([*done, x.new_zeros(len(x) - sum(counts), x.shape[1])])

    def init_weights(self, init_std: float) -> None:
        """As torchtitan's FeedForward."""
        for expert in self:
            expert.init_weights(init_std)


def split_experts(model: nn.Module) -> None:
    """Give every expert of a torchtitan model linears of its own, in place, uninitialized."""
    for module in model.modules():
        if isinstance(module, MoE):
            count, hidden, dim = module.experts.w1.shape
            module.experts = SplitExperts(dim, hidden, count)


def args_from_dict(family: Family, given: dict) -> BaseModelArgs:
    """Model args from the JSON of `dataclasses.asdict`."""
    nested = {
        field.name: field.default_factory
        for field in fields(family.args)
        if field.default_factory is not MISSING and is_dataclass(field.default_factory)
    }
    values = {name: nested[name](**v) if name in nested else v for name, v in given.items()}
    return family.args(**values)


def _llama_config(args: TransformerModelArgs) -> dict:
    rope = args.rope_scaling_args
    return {
        "hidden_size": args.dim,
        "intermediate_size": _llama_hidden(args),
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads or args.n_heads,
        "head_dim": args.dim // args.n_heads,
        "rope_theta": args.rope_theta,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": rope.scaling_factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        },
        "mlp_bias": False,
    }


def _llama_hidden(args: TransformerModelArgs) -> int:
    with torch.device("meta"):
        model = Transformer(args)
    return model.layers["0"].feed_forward.w1.weight.shape[0]


def _check_features(config: dict, ropes: tuple[str, ...], **has) -> None:
    """Check that a config.json asks for nothing that torchtitan's model lacks.

    Args:
        config: config.json.
        ropes: Kinds of RoPE that the model has.
        has: The one value that the model has, by key.

    Raises:
        UnsupportedError: it does.
    """
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    wanted = {"hidden_act": "silu", "attention_bias": False, **has}
    other = [key for key, value in wanted.items() if config.get(key, value) != value]
    asked = f"{other[0]} = {config[other[0]]!r}" if other else f"rope_type = {kind!r}"
    if other or kind not in ropes:
        raise UnsupportedError(
            f"config.json asks for {asked}, which torchtitan's {config['model_type']} does not "
            "have: it would compute something else"
        )


def _llama_args(config: dict) -> TransformerModelArgs:
    _check_features(config, ("default", "llama3"), mlp_bias=False)
    dim, hidden = config["hidden_size"], config["intermediate_size"]
    base = int(2 * 4 * dim / 3)
    rope = _rope(config)
    scaling = {
        "scaling_factor": rope.get("factor", 1.0),
        "low_freq_factor": rope.get("low_freq_factor", 1.0),
        "high_freq_factor": rope.get("high_freq_factor", 4.0),
        "original_max_position_embeddings": rope.get(
            "original_max_position_embeddings", config["max_position_embeddings"]
        ),
    }
    return TransformerModelArgs(
        dim=dim,
        n_layers=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config["num_key_value_heads"],
        vocab_size=config["vocab_size"],
        multiple_of=1,
        ffn_dim_multiplier=(hidden + 0.5) / base,
        norm_eps=config["rms_norm_eps"],
        rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        rope_scaling_args=RoPEScalingArgs(**scaling),
        max_seq_len=config["max_position_embeddings"],
    )


def _rope(config: dict) -> dict:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _deepseek_config(args: DeepSeekV3ModelArgs) -> dict:
    moe = args.moe_args
    if moe.score_before_experts:
        raise UnsupportedError(
            "the model multiplies tokens by their scores before the experts, which no inference "
            "engine's DeepSeek does: train with score_before_experts = False to export it"
        )
    config = {
        "hidden_size": args.dim,
        "intermediate_size": args.inter_dim,
        "moe_intermediate_size": args.moe_inter_dim,
        "num_hidden_layers": args.n_layers,
        "first_k_dense_replace": args.n_dense_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_heads,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_layer_freq": 1,
        "n_group": moe.num_expert_groups or 1,
        "topk_group": moe.num_limited_groups or 1,
        "topk_method": "noaux_tc",
        "scoring_func": moe.score_func,
        "norm_topk_prob": moe.route_norm,
        "routed_scaling_factor": moe.route_scale,
        "q_lora_rank": args.q_lora_rank or None,
        "kv_lora_rank": args.kv_lora_rank,
        "qk_nope_head_dim": args.qk_nope_head_dim,
        "qk_rope_head_dim": args.qk_rope_head_dim,
        "v_head_dim": args.v_head_dim,
        "rope_theta": args.rope_theta,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }
    if args.max_seq_len > args.original_seq_len:
        config["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": args.rope_factor,
            "beta_fast": args.beta_fast,
            "beta_slow": args.beta_slow,
            # Equal, so that they scale the softmax alone, as torchtitan does.
            "mscale": args.mscale,
            "mscale_all_dim": args.mscale,
            "original_max_position_embeddings": args.original_seq_len,
        }
    return config


def _deepseek_args(config: dict) -> DeepSeekV3ModelArgs:
    _check_features(config, ("default", "yarn"), moe_layer_freq=1)
    rope = _rope(config)
    longest = config["max_position_embeddings"]
    grouped = config.get("n_group", 1) not in (None, 1)
    moe = MoEArgs(
        num_experts=config["n_routed_experts"],
        num_shared_experts=config["n_shared_experts"],
        score_func=config.get("scoring_func", "sigmoid"),
        route_norm=config["norm_topk_prob"],
        route_scale=config["routed_scaling_factor"],
        score_before_experts=False,
        top_k=config["num_experts_per_tok"],
        num_expert_groups=config["n_group"] if grouped else None,
        num_limited_groups=config["topk_group"] if grouped else None,
    )
    return DeepSeekV3ModelArgs(
        max_seq_len=longest,
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        inter_dim=config["intermediate_size"],
        moe_inter_dim=config["moe_intermediate_size"],
        n_layers=config["num_hidden_layers"],
        n_dense_layers=config["first_k_dense_replace"],
        n_heads=config["num_attention_heads"],
        norm_eps=config["rms_norm_eps"],
        moe_args=moe,
        q_lora_rank=config["q_lora_rank"] or 0,
        kv_lora_rank=config["kv_lora_rank"],
        qk_nope_head_dim=config["qk_nope_head_dim"],
        qk_rope_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
        original_seq_len=int(rope.get("original_max_position_embeddings", longest)),
        rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        rope_factor=rope.get("factor", 1.0),
        beta_fast=rope.get("beta_fast", 32),
        beta_slow=rope.get("beta_slow", 1),
        mscale=rope.get("mscale_all_dim", 1.0),
    )


FAMILIES = (
    Family(
        "llama3",
        "llama",
        "LlamaForCausalLM",
        Transformer,
        TransformerModelArgs,
        Llama3StateDictAdapter,
        _llama_config,
        _llama_args,
    ),
    Family(
        "deepseek_v3",
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        DeepSeekV3Model,
        DeepSeekV3ModelArgs,
        DeepSeekV3StateDictAdapter,
        _deepseek_config,
        _deepseek_args,
    ),
)


def family_of_run(name: str) -> Family:
    """By torchtitan's name.

    Raises:
        UnsupportedError: another model.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    names = " and ".join(family.name for family in FAMILIES)
    raise UnsupportedError(
        f"the run trained {name}: only {names} models are read and finalized here; export "
        "others with torchtitan's own Hugging Face checkpoints"
    )


def family_of_config(config: dict) -> Family:
    """By a config.json.

    Raises:
        UnsupportedError: another model.
    """
    for family in FAMILIES:
        if family.hf_type == config.get("model_type"):
            return family
    types = " and ".join(family.hf_type for family in FAMILIES)
    raise UnsupportedError(
        f"model_type {config.get('model_type')!r}: only {types} models are read in this version"
    )
