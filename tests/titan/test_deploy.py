"""bf16 / PTQ / QAT, finalized, read by transformers, evaluated; from other sources; bad input."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import SMALL_RUN, relative_error
from torch import nn

from nvfp4_titan.convergence.launch import Job
from nvfp4_titan.deploy import DEPLOY_RECIPES
from nvfp4_titan.deploy.layout import pack_int4, unpack_int4
from nvfp4_titan.deploy.table import (
    KINDS,
    TableOptions,
    format_tables,
    merge,
    place,
    plot_tables,
    read_tables,
    write_tables,
)
from nvfp4_titan.errors import ConfigError, OutOfTime, UnsupportedError
from nvfp4_titan.numerics import quantize
from nvfp4_titan.training import NVFP4Linear

CONFIG = Path(__file__).parents[2] / "train_configs" / "llama3_debug.toml"
TABLE = ("nvfp4", "int8_act_int4_weight")
NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
}


@pytest.mark.slow
def test_runs_become_a_table_and_checkpoints_that_transformers_loads(
    train, single_rank, monkeypatch
):
    """bf16 / PTQ / QAT as the command makes it; its runs serve the other checks."""
    from nvfp4_titan.titan.evaluate import evaluate
    from nvfp4_titan.titan.finalize import FinalizeOptions, finalize

    _check_table(single_rank, monkeypatch)
    runs = single_rank / "runs"
    source = runs / "bf16"
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
    for recipe in ("nvfp4", "int8_act_int4_weight", "float8_act_float8_weight"):
        _check_client(single_rank / recipe)
    _check_qat(single_rank, runs / "qat_nvfp4")
    _check_from_hf(single_rank)
    _check_bad_input(single_rank, source)


def _check_table(folder, monkeypatch):
    from nvfp4_titan.titan.qat_table import Comparison
    from nvfp4_titan.titan.trainer import run

    made = []

    def execute(job, deadline, watch, lock):
        made.append(job.folder.name)
        run(job.command()[3:])

    monkeypatch.setattr(Job, "_execute", execute)
    options = TableOptions(
        base_steps=40, tune_steps=12, tune_lr=2e-4, seq_len=64, steps=8, recipes=TABLE
    )
    extra = (
        *SMALL_RUN,
        "--training.local_batch_size=8",
        "--validation.seq_len=64",
        "--validation.steps=1",
        "--validation.freq=100",
    )
    comparison = Comparison(CONFIG, folder / "runs", options, extra)
    parts = dict(comparison.parts(TABLE))
    assert made == ["base", "bf16", *(f"qat_{recipe}" for recipe in TABLE)]
    assert list(parts) == list(TABLE)
    for recipe, part in parts.items():
        bf16, ptq, qat = (part[kind]["loss"] for kind in KINDS)
        print(recipe, bf16, ptq, qat, part["step_time_ratio"])
        assert bf16 < 7.3  # 7.6 is a uniform guess
        assert 1e-5 < abs(ptq - bf16) < 0.05
        assert 1e-5 < abs(qat - ptq)
        assert qat < ptq + 0.01
        assert part["PTQ"]["recipe"] == part["QAT"]["recipe"] == recipe
        assert part["step_time_ratio"] > 0.2
    # Called again, nothing is made again; of other calibration all is finalized again, and no more.
    marks = [path / "mark" for path in (folder / "runs").glob("final_*/")]
    for mark in marks:
        mark.touch()
    assert dict(comparison.parts(TABLE)) == parts and all(mark.exists() for mark in marks)
    other = replace(comparison, options=replace(options, calibration_dataset="stdlib_validation"))
    assert dict(other.parts(TABLE)).keys() == parts.keys()
    assert marks and not any(mark.exists() for mark in marks)
    assert len(made) == 2 + len(TABLE)
    with pytest.raises(OutOfTime):
        dict(replace(comparison, deadline=0.0).parts(TABLE))


def _check_qat(folder, run):
    """A QAT run is finalized with its recipe, and the file holds the codes that it trained with."""
    from nvfp4_titan.titan.finalize import FinalizeOptions, finalize
    from nvfp4_titan.titan.sources import Source

    out = folder / "final_qat"
    with pytest.raises(ConfigError, match="was trained for 'nvfp4'"):
        finalize(run, out, FinalizeOptions("nvfp4_weight_only"))
    options = FinalizeOptions("nvfp4", calibration_batches=1, seq_len=64, skip=("layers.0.*",))
    with pytest.raises(ConfigError, match="trained with share_scales = True.*leave share_scales"):
        finalize(run, out, replace(options, share_scales=False))
    finalize(run, out, options)
    _check_client(out)
    config = json.loads((out / "config.json").read_text())
    assert "model.layers.0.self_attn.q_proj" in config["quantization_config"]["ignore"]
    card = (out / "README.md").read_text()
    assert "trained with: qat, recipe nvfp4" in card and "validation loss of the run" in card
    assert f"source: {run.name}, step-" in card
    assert "trained with: qat, recipe nvfp4, in float32: its codes were others" in card
    weights = dict(Source(run).weights())
    finalize(run, folder / "as_trained", replace(options, dtype="float32"))
    assert "codes were others" not in (folder / "as_trained" / "README.md").read_text()
    for made, dtype in ((out, torch.bfloat16), (folder / "as_trained", torch.float32)):
        trained = {name: t.to(dtype) for name, t in weights.items()}
        with safe_open(made / "model.safetensors", "pt") as stored:
            _check_trained_codes(trained, stored, ("attention.wo",))
            _check_trained_codes(trained, stored, ("attention.wq", "attention.wk", "attention.wv"))
            _check_trained_codes(trained, stored, ("feed_forward.w1", "feed_forward.w3"))


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


def _check_trained_codes(trained, stored, fused):
    """Of linears with one scale: the codes that the QAT forward makes of the trained weights."""
    weights = {name: trained[f"layers.1.{name}.weight"] for name in fused}
    amax = torch.stack([weight.abs().amax() for weight in weights.values()]).amax().float()
    for name, weight in weights.items():
        operand = quantize(weight, block=(16, 16), amax=amax)
        codes, scale = operand.codes, operand.block_scale.float()
        if name in ("attention.wq", "attention.wk"):
            # transformers' RoPE takes a head's even rows first, then the odd ones.
            rows = torch.arange(len(codes)).view(16, -1, 2).transpose(1, 2).flatten()
            codes, scale = codes[rows], scale[rows]
        prefix = f"model.layers.1.{NAMES[name]}"
        assert torch.equal(stored.get_tensor(f"{prefix}.weight_packed"), codes), name
        assert torch.equal(stored.get_tensor(f"{prefix}.weight_scale").float(), scale), name
        global_scale = stored.get_tensor(f"{prefix}.weight_global_scale")
        assert torch.equal(global_scale, torch.div(torch.tensor([2688.0]), amax))


def _check_from_hf(folder):
    """A Hugging Face folder gives the same checkpoint, with our part of its config and without."""
    from nvfp4_titan.titan.finalize import FinalizeOptions, finalize

    options = FinalizeOptions("nvfp4_weight_only")
    for key in ("nvfp4_titan", None):
        config = json.loads((folder / "bf16" / "config.json").read_text())
        config.pop(key, None)
        (folder / "bf16" / "config.json").write_text(json.dumps(config))
        out = folder / f"from_hf_without_{key}"
        finalize(folder / "bf16", out, options)
        stored = (out / "model.safetensors").read_bytes()
        assert stored == (folder / "nvfp4_weight_only" / "model.safetensors").read_bytes()


def _check_bad_input(folder, source):
    from nvfp4_titan.titan.evaluate import evaluate, load_model
    from nvfp4_titan.titan.finalize import FinalizeOptions, finalize

    out, options = folder / "new", FinalizeOptions("nvfp4_weight_only")
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
    with pytest.raises(ConfigError, match="is unknown: use one of"):
        evaluate(folder / "nvfp4", dataset="nothing", seq_len=64, steps=1)

    damaged = folder / "damaged"
    shutil.copytree(folder / "bf16", damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(ConfigError, match=r"layers\.2\..*weight of .*damaged is not finite"):
        finalize(damaged, out, options)
    with pytest.raises(ConfigError, match="the loss of .*damaged is not finite"):
        evaluate(damaged, seq_len=64, steps=1)
    assert not out.exists()
    with pytest.raises(ConfigError, match="--seq-len"):
        evaluate(folder / "nvfp4", seq_len=2**20, steps=1)

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
    shard = next((source / "checkpoint" / "step-12").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="step-12 is not whole: .* of .* bytes. Resume the run"):
        finalize(source, folder / "newer", FinalizeOptions("nvfp4"))
    with pytest.raises(ConfigError, match="of .* bytes"):
        finalize(source / "checkpoint" / "step-12", folder / "newer", FinalizeOptions("nvfp4"))


def _contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_file_holds_tables_of_several_machines(tmp_path):
    rows = {kind: {"perplexity": 9.0 + i / 8} for i, kind in enumerate(KINDS)}
    part = rows | {"step_time_ratio": 1.25}
    options = TableOptions(steps=2)
    tables = read_tables(tmp_path / "qat.json")
    for device, recipe in (("cpu", "nvfp4"), ("H100", "nvfp4"), ("cpu", "mxfp8")):
        table = place(tables, "llama3_debug", device, options.request(CONFIG, ()))
        table["recipes"][recipe] = part
        write_tables(tmp_path / "qat", tables)
        tables = read_tables(tmp_path / "qat.json")
    assert [(t["device"], list(t["recipes"])) for t in tables] == [
        ("cpu", ["nvfp4", "mxfp8"]),
        ("H100", ["nvfp4"]),
    ]
    # Other options are another table, even where one asks for more recipes.
    assert (
        place(tables, "llama3_debug", "cpu", TableOptions(steps=3).request(CONFIG, ()))["recipes"]
        == {}
    )
    more = replace(options, recipes=("mxfp4",)).request(CONFIG, ())
    merge(tables, [{**tables[1], "options": more, "recipes": {"mxfp4": part, "nvfp4": {}}}])
    assert tables[1]["recipes"] == {"mxfp4": part, "nvfp4": part}
    assert "| llama3_debug | H100 | mxfp4 | 9.000 | 9.125 | 9.250 | 1.25 |" in format_tables(tables)
    plot_tables(tmp_path / "qat", tables[:2])
    assert (tmp_path / "qat.png").stat().st_size > 1000
    (tmp_path / "qat.json").write_text("[]")
    with pytest.raises(ConfigError, match="no file of bf16"):
        read_tables(tmp_path / "qat.json")


def test_a_comparison_needs_its_toml(tmp_path):
    from nvfp4_titan.titan.qat_table import Comparison

    with pytest.raises(ConfigError, match="is not there: see train_configs"):
        Comparison(tmp_path / "no.toml", tmp_path, TableOptions())
    for options, extra, message in (
        (TableOptions(recipes=("nvpf4",)), (), "deploy recipe 'nvpf4' is unknown"),
        (TableOptions(recipes=()), (), "--recipes is empty"),
        (TableOptions(), ("--training.steps=1",), "use --base-steps"),
        (TableOptions(), ("--model.converters", "nvfp4"), "use --recipes"),
        (TableOptions(), ("--validation.no_enable",), "set validation.enable"),
        (TableOptions(dataset="nowhere"), (), "dataset 'nowhere' is unknown"),
        (TableOptions(calibration_dataset="nowhere"), (), "dataset 'nowhere' is unknown"),
        (TableOptions(seq_len=512), (), "longer than the model's 256"),
        (TableOptions(steps=-1), (), "0 or more steps"),
        (TableOptions(device="tpu"), (), "device 'tpu' cannot be used"),
        (TableOptions(), ("--model.flavor=7B",), "model.flavor '7B' is unknown"),
    ):
        with pytest.raises(ConfigError, match=message):
            Comparison(CONFIG, tmp_path, options, extra)


def test_a_table_is_of_one_toml(tmp_path):
    config = tmp_path / "llama3_debug.toml"
    config.write_text(CONFIG.read_text())
    requests = [TableOptions().request(path, ()) for path in (CONFIG, config)]
    assert requests[0] == requests[1]
    config.write_text(CONFIG.read_text().replace("lr = ", "lr = 1"))
    assert TableOptions().request(config, ()) != requests[0]


def test_int4_packing_round_trips_as_compressed_tensors_packs():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    assert torch.equal(pack_int4(codes), pack_to_int32(codes, 4))
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)


def test_qat_settings_are_checked(train):
    with pytest.raises(ConfigError, match="list qat alone"):
        train("--training.steps=1", "--model.converters=nvfp4,qat")
    with pytest.raises(ConfigError, match="deploy recipe 'int3' is unknown"):
        train("--training.steps=1", "--model.converters=qat", "--qat.recipe=int3")
    with pytest.raises((ConfigError, UnsupportedError)):
        train("--training.steps=1", "--model.converters=qat", "--qat.skip=nothing")


def test_qat_is_refused_what_no_converter_survives(single_rank):
    """Started as `-m torchtitan.train`, where a converter's checks are all there are."""
    from torch._inductor import config as inductor

    from nvfp4_titan.titan.qat import QATConverter
    from nvfp4_titan.titan.sharding import parallel_dims
    from nvfp4_titan.titan.trainer import parse

    job = parse([*SMALL_RUN, f"--job.config_file={CONFIG}", "--model.converters=qat",
                 "--qat.recipe=nvfp4", "--compile.enable", "--training.global_batch_size=8",
                 "--training.local_batch_size=1"])  # fmt: skip
    with inductor.patch("triton.cudagraphs", True), pytest.raises(UnsupportedError, match="graphs"):
        QATConverter(job, parallel_dims(job, 1))


@pytest.mark.parametrize("ranks", [1, 2])
def test_qat_keeps_no_codes_of_weights_that_fsdp_frees(ranks, single_rank):
    """Whole ones would undo the sharding; gradients are the same without."""
    from nvfp4_titan.titan.qat import QATConverter
    from nvfp4_titan.titan.sharding import parallel_dims
    from nvfp4_titan.titan.trainer import parse

    job = parse([*SMALL_RUN, f"--job.config_file={CONFIG}", "--model.converters=qat",
                 "--qat.recipe=nvfp4"])  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    QATConverter(job, parallel_dims(job, ranks)).convert(model)
    converted = [module for module in model.modules() if isinstance(module, NVFP4Linear)]
    assert [module.requantize for module in converted] == [ranks > 1] * 2
    found = []
    for requantize in (False, True):
        for module in converted:
            module.requantize = requantize
        model.zero_grad()
        saved = []
        keep = lambda t, saved=saved: saved.append(t) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(torch.ones(8, 64).cumsum(1) / 64).square().sum()
        loss.backward()
        own = {p.data_ptr() for p in model.parameters()}
        held = sum(t.nbytes for t in saved if t.data_ptr() not in own)
        found.append((held, [p.grad for p in model.parameters()]))
    (with_codes, grads), (without, others) = found
    assert without < with_codes and all(map(torch.equal, grads, others))
