"""DeepSeekV3 finalized: every expert a packed linear, under the names that others read.

Its checkpoint is saved again by two ranks that shard it: what is finalized must be the same.
"""

import json
import shutil

import pytest
import torch
from ranks import spawn
from safetensors.torch import load_file
from support import relative_error

from nvfp4_titan.numerics import quantize
from nvfp4_titan.titan import cpu_runtime

EXPERTS = 4
OURS, THEIRS = (
    "layers.1.moe.experts",
    {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
)


def register_tiny():
    """A DeepSeekV3 of 4 experts that transformers' class can hold too: sigmoid scores, yarn."""
    from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs, deepseekv3_args
    from torchtitan.models.moe import MoEArgs

    moe = MoEArgs(
        num_experts=EXPERTS,
        top_k=2,
        score_func="sigmoid",
        route_norm=True,
        route_scale=1.5,
        score_before_experts=False,
    )
    deepseekv3_args["tiny"] = DeepSeekV3ModelArgs(
        vocab_size=2048, dim=64, inter_dim=128, moe_inter_dim=64, n_layers=2, n_dense_layers=1,
        n_heads=2, moe_args=moe, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=32,
        qk_rope_head_dim=16, v_head_dim=32, original_seq_len=32, rope_factor=4.0, mscale=0.7,
    )  # fmt: skip
    return deepseekv3_args


@pytest.fixture
def run(train, single_rank):
    """The dump folder of a tiny DeepSeekV3, with experts trained in NVFP4."""
    flavors = register_tiny()
    train(
        "--model.name=deepseek_v3",
        "--model.flavor=tiny",
        "--model.converters=nvfp4",
        "--nvfp4.bf16_last_fraction=0",
        "--training.dataset=stdlib",
        "--training.steps=3",
        "--checkpoint.enable",
        "--checkpoint.interval=3",
        "--checkpoint.last_save_model_only",
        folder="run",
    )
    yield single_rank / "run"
    del flavors["tiny"]


@pytest.mark.slow
def test_every_expert_is_a_packed_linear(run):
    from nvfp4_titan.titan.evaluate import evaluate
    from nvfp4_titan.titan.finalize import FinalizeOptions, finalize
    from nvfp4_titan.titan.sources import Source

    out, losses = run.parent, {}
    for name, options in {
        "bf16": FinalizeOptions("bf16"),
        "nvfp4": FinalizeOptions("nvfp4", calibration_batches=1, seq_len=64),
        "own": FinalizeOptions("nvfp4_weight_only", share_scales=False),
    }.items():
        finalize(run, out / name, options)
        losses[name] = evaluate(out / name, seq_len=64, steps=1)["loss"]
    assert 0 < abs(losses["nvfp4"] - losses["bf16"]) < 0.05
    assert 0 < abs(losses["own"] - losses["bf16"]) < 0.05
    _check_transformers(out / "bf16")

    config = json.loads((out / "nvfp4" / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    assert ignored == ["model.layers.1.mlp.gate", "lm_head"]
    trained = dict(Source(run).weights())
    assert set(trained) == set(Source(out / "bf16").shapes)
    _check_experts(out / "own", trained, shared=False)
    _check_experts(out / "nvfp4", trained, shared=True)
    _check_sharded(run, out)


def _check_sharded(run, out):
    """A checkpoint of two FSDP ranks is finalized to the same bytes."""
    from nvfp4_titan.titan.finalize import FinalizeOptions, finalize

    again = out / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoint" / "step-3")
    (out / "ranks").mkdir()
    spawn(save_sharded, "cpu", 2, out / "ranks", run, again / "checkpoint" / "step-3")
    assert len(list((again / "checkpoint" / "step-3").glob("*.distcp"))) == 2
    finalize(again, out / "sharded", FinalizeOptions("nvfp4_weight_only", share_scales=False))
    stored = [(out / name / "model.safetensors").read_bytes() for name in ("own", "sharded")]
    assert stored[0] == stored[1]


def save_sharded(rank, device, run, target):
    """On each of two ranks: load a run's checkpoint into FSDP's shards, and save those."""
    cpu_runtime.install()
    from torch.distributed import checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    from nvfp4_titan.titan.sources import Source

    register_tiny()
    source = Source(run)
    with torch.device("meta"):
        model = source.family.model(source.args)
    for part in (*model.layers.values(), model):
        fully_shard(part)
    model.to_empty(device="cpu")
    state = model.state_dict()
    dcp.load(state, checkpoint_id=str(run / "checkpoint" / "step-3"))
    dcp.save(state, checkpoint_id=str(target))


def _check_experts(folder, trained, shared):
    """Codes are those of the trained weights; compressed-tensors reads what we multiply."""
    from nvfp4_titan.titan.evaluate import load_model

    tensors, (ours, _) = load_file(folder / "model.safetensors"), load_model(folder)
    for expert in range(EXPERTS):
        own = {name: trained[f"{OURS}.{expert}.{name}.weight"].bfloat16() for name in THEIRS}
        together = torch.stack([own["w1"], own["w3"]]).abs().amax().float()
        for name, theirs in THEIRS.items():
            prefix = f"model.layers.1.mlp.experts.{expert}.{theirs}."
            mine = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            # The run computed with each expert's own amax.
            amax = together if shared and name != "w2" else None
            operand = quantize(own[name], block=(16, 16), amax=amax)
            assert torch.equal(mine["weight_packed"], operand.codes)
            assert torch.equal(mine["weight_scale"].float(), operand.block_scale.float())
            weight = ours.get_submodule(f"{OURS}.{expert}.{name}").weight
            assert torch.equal(_decompressed(mine, folder), weight)
        scales = [
            tensors[f"model.layers.1.mlp.experts.{expert}.{name}.weight_global_scale"]
            for name in ("gate_proj", "up_proj")
        ]
        assert torch.equal(*scales) == shared


def _decompressed(tensors, folder):
    """A linear's weight as compressed-tensors gives it to its clients."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    return compressor.decompress(tensors, scheme)["weight"].bfloat16()


def _check_transformers(folder):
    """transformers' own DeepSeekV3 computes what torchtitan's does: names and config are right."""
    from transformers import AutoModelForCausalLM

    from nvfp4_titan.titan.evaluate import load_model

    client = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours, _ = load_model(folder, dtype="float32")
    tokens = torch.randint(0, 2048, (1, 64))
    with torch.no_grad():
        assert relative_error(ours(tokens), client(tokens).logits) <= 1e-4
