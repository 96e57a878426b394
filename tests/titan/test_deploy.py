"""A run in bf16 and one in QAT, finalized, read by transformers, evaluated; and bad input."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import relative_error

from nvfp4_titan.deploy import DEPLOY_RECIPES
from nvfp4_titan.deploy.layout import pack_int4, unpack_int4
from nvfp4_titan.errors import ConfigError, UnsupportedError

RUN = (
    "--model.name=llama3",
    "--model.flavor=debugmodel",
    "--training.dataset=stdlib",
    "--lr_scheduler.warmup_steps=2",
    "--checkpoint.enable",
    "--checkpoint.interval=100",
    "--checkpoint.last_save_model_only",
)


@pytest.mark.slow
def test_a_run_becomes_checkpoints_that_transformers_loads(train, single_rank, monkeypatch):
    from nvfp4_titan.titan.evaluate import evaluate
    from nvfp4_titan.titan.finalize import FinalizeOptions, finalize

    train(*RUN, "--training.steps=40", folder="run")
    train(
        *RUN,
        "--training.steps=3",
        "--model.converters=qat",
        "--qat.recipe=nvfp4_weight_only",
        "--qat.skip=layers.0.*",
        f"--checkpoint.initial_load_path={single_rank}/run/checkpoint/step-40",
        folder="qat",
    )
    source = single_rank / "run"
    before = _contents(source)
    losses = {}
    for recipe in ("bf16", *DEPLOY_RECIPES):
        out = single_rank / recipe
        sizes = finalize(source, out, FinalizeOptions(recipe, calibration_batches=1, seq_len=64))
        found = evaluate(out, seq_len=64, steps=1)
        losses[recipe] = found["loss"]
        assert found["recipe"] == ("none" if recipe == "bf16" else recipe)
        if "nvfp4" in recipe:
            assert sizes["quantized"] <= 0.30 * sizes["quantized_as_bf16"]
    assert _contents(source) == before
    assert all(abs(loss - losses["bf16"]) < 0.05 for loss in losses.values())
    assert len(set(losses.values())) == len(losses)
    for recipe in (
        "nvfp4",
        "nvfp4_weight_only",
        "int8_act_int4_weight",
        "float8_act_float8_weight",
    ):
        _check_client(single_rank / recipe)

    qat = single_rank / "final_qat"
    with pytest.raises(ConfigError, match="was trained for 'nvfp4_weight_only'"):
        finalize(single_rank / "qat", qat, FinalizeOptions("nvfp4"))
    finalize(single_rank / "qat", qat, FinalizeOptions("nvfp4_weight_only"))
    _check_client(qat)
    config = json.loads((qat / "config.json").read_text())
    assert "model.layers.0.self_attn.q_proj" in config["quantization_config"]["ignore"]
    assert "recipe nvfp4_weight_only" in (qat / "README.md").read_text()
    _check_trained_codes(single_rank / "qat", qat)
    _check_bad_input(single_rank)


def _check_client(folder):
    """transformers with compressed-tensors, none of our code, against our evaluation's model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nvfp4_titan.titan.evaluate import load_model

    client = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    text = "def main(argv):\n    return len(argv)\n" * 4
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder).encode(text)])
    ours, source = load_model(folder)
    with torch.no_grad():
        assert relative_error(ours(tokens), client(tokens).logits) <= 1e-2
    for fqn in source.config["nvfp4_titan"]["quantized"]:
        hf = source.hf_name(f"{fqn}.weight")
        weight = ours.get_submodule(fqn).weight
        weight = weight if hf.rows is None else weight[hf.rows]
        theirs = client.get_submodule(hf.name.removesuffix(".weight")).weight
        assert torch.equal(weight, theirs), fqn


def _check_trained_codes(run, folder):
    """The file holds the codes that the QAT forward makes of the trained weights."""
    from nvfp4_titan.numerics import quantize
    from nvfp4_titan.titan.sources import Source

    weight = dict(Source(run).weights())["layers.1.attention.wo.weight"]
    operand = quantize(weight.bfloat16(), block=(16, 16))
    with safe_open(folder / "model.safetensors", "pt") as stored:
        name = "model.layers.1.self_attn.o_proj"
        assert torch.equal(stored.get_tensor(f"{name}.weight_packed"), operand.codes)
        scale = stored.get_tensor(f"{name}.weight_scale")
        assert torch.equal(scale.float(), operand.block_scale.float())


def _check_bad_input(folder):
    from nvfp4_titan.titan.evaluate import evaluate, load_model
    from nvfp4_titan.titan.finalize import FinalizeOptions, finalize

    source, out, options = folder / "run", folder / "new", FinalizeOptions("nvfp4_weight_only")
    with pytest.raises(ConfigError, match="exists: give a folder that does not"):
        finalize(source, folder / "nvfp4", options)
    with pytest.raises(ConfigError, match="is not a folder"):
        finalize(folder / "nothing", out, options)
    with pytest.raises(ConfigError, match="no tokenizer.json"):
        finalize(source, out, FinalizeOptions("nvfp4_weight_only", tokenizer=source))
    with pytest.raises(ConfigError, match="matches no linear"):
        finalize(source, out, FinalizeOptions("nvfp4_weight_only", skip=("nothing",)))
    with pytest.raises(ConfigError, match="quantized already"):
        finalize(folder / "nvfp4", out, options)
    with pytest.raises(ConfigError, match="is not supported"):
        evaluate(folder / "nvfp4", dataset="nothing", seq_len=64, steps=1)

    # A full disk, in the middle of the weights.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nvfp4_titan.deploy.writer.save_file", _no_space)
        with pytest.raises(ConfigError, match="free some space"):
            finalize(source, out, FinalizeOptions("nvfp4_weight_only", shard_bytes=2**20))
    assert not out.exists() and not list(folder.glob(".new*"))
    # Shards of 1 MB hold the same.
    finalize(source, out, FinalizeOptions("nvfp4_weight_only", shard_bytes=2**20))
    assert len(list(out.glob("model-*.safetensors"))) > 3
    options = {"seq_len": 64, "steps": 1}
    whole = evaluate(folder / "nvfp4_weight_only", **options)
    assert evaluate(out, **options)["loss"] == whole["loss"]

    cut = folder / "cut"
    shutil.copytree(folder / "nvfp4", cut)
    file = cut / "model.safetensors"
    tensors = load_file(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cut short"):
        load_model(cut)
    del tensors["model.layers.2.mlp.up_proj.weight_packed"]
    save_file(tensors, file)
    with pytest.raises(ConfigError, match="has no tensor model.layers.2.mlp.up_proj"):
        load_model(cut)
    shard = next((source / "checkpoint" / "step-40").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        finalize(source, folder / "newer", FinalizeOptions("nvfp4"))
    with pytest.raises(ConfigError, match="of .* bytes"):
        finalize(source / "checkpoint" / "step-40", folder / "newer", FinalizeOptions("nvfp4"))


def _no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


def _contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_int4_packing_round_trips_as_compressed_tensors_packs():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    assert torch.equal(pack_int4(codes), pack_to_int32(codes, 4))
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)


def test_qat_settings_are_checked(train):
    with pytest.raises(ConfigError, match="list qat alone"):
        train(*RUN, "--training.steps=1", "--model.converters=nvfp4,qat")
    with pytest.raises(ConfigError, match="deploy recipe 'int3' is unknown"):
        train(*RUN, "--training.steps=1", "--model.converters=qat", "--qat.recipe=int3")
    with pytest.raises((ConfigError, UnsupportedError)):
        train(*RUN, "--training.steps=1", "--model.converters=qat", "--qat.skip=nothing")
