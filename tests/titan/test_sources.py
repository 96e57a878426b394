"""Hugging Face folders as sources: what torchtitan's models compute, and what they do not."""

import json
import subprocess
import sys

import pytest
import torch
from support import relative_error
from transformers import LlamaConfig, LlamaForCausalLM

from nvfp4_titan.errors import ConfigError, UnsupportedError
from nvfp4_titan.titan.evaluate import load_model
from nvfp4_titan.titan.finalize import FinalizeOptions, finalize

LONG = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture
def saved(tmp_path):
    """A function that makes a tiny Llama of transformers and saves it: the model and its folder."""

    def save(dtype=torch.float32, **config):
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        }  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(**sizes | config)).to(dtype).eval()
        model.save_pretrained(tmp_path / "hf")
        return model, tmp_path / "hf"

    return save


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": True},
        {
            "rope_scaling": LONG
            | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        },
    ],
    ids=["plain", "tied", "llama3 rope"],
)
def test_computes_what_transformers_does(saved, config):
    model, folder = saved(**config)
    ours, _ = load_model(folder, dtype="float32")
    tokens = torch.randint(0, 64, (1, 100))
    with torch.no_grad():
        assert relative_error(ours(tokens), model(tokens).logits) < 1e-5


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        *(
            ({"rope_scaling": LONG | {"rope_type": kind}}, f"rope_type = '{kind}'")
            for kind in ("linear", "dynamic", "yarn")
        ),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(saved, config, asked):
    _, folder = saved(**config)
    with pytest.raises(UnsupportedError, match=f"asks for {asked}"):
        load_model(folder)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_runs_in_the_dtype_that_the_config_names(saved, key):
    _, folder = saved(torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    named = config.pop("dtype", None) or config.pop("torch_dtype")
    (folder / "config.json").write_text(json.dumps(config | {key: named}))
    ours, _ = load_model(folder)
    assert ours.output.weight.dtype == torch.bfloat16


def test_a_config_that_lacks_a_size(saved):
    _, folder = saved()
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="config.json has no hidden_size"):
        load_model(folder)


def test_a_tied_model_is_finalized_with_both(saved, tmp_path):
    from nvfp4_titan.titan.corpus import tokenizer_path

    model, folder = saved(tie_word_embeddings=True, vocab_size=2048)
    options = FinalizeOptions("nvfp4_weight_only", tokenizer=tokenizer_path())
    finalize(folder, tmp_path / "out", options)
    ours, _ = load_model(tmp_path / "out")
    embeddings = model.model.embed_tokens.weight.bfloat16()
    assert torch.equal(ours.output.weight, embeddings)
    assert torch.equal(ours.tok_embeddings.weight, embeddings)


ALONE = """
import sys
from pathlib import Path
from nvfp4_titan.titan import cpu_runtime
cpu_runtime.install()
from nvfp4_titan.titan.evaluate import evaluate
from nvfp4_titan.titan.corpus import tokenizer_path
print(evaluate(Path(sys.argv[1]), tokenizer=tokenizer_path(), seq_len=32, steps=1)["loss"])
"""


def test_evaluates_in_a_process_that_registered_nothing(saved):
    _, folder = saved(vocab_size=2048)
    command = [sys.executable, "-c", ALONE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 7 < float(done.stdout.split()[-1]) < 8.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len 0, batch 4"),
        ({"batch": 0}, "batch 0"),
        ({"steps": -1}, "steps -1"),
        ({"device": "foo"}, "device 'foo' cannot be used"),
        ({"dataset": "nope"}, "dataset 'nope'"),
    ],
)
def test_what_cannot_be_evaluated(saved, options, message):
    from nvfp4_titan.titan.corpus import tokenizer_path
    from nvfp4_titan.titan.evaluate import evaluate

    _, folder = saved(vocab_size=2048)
    with pytest.raises(ConfigError, match=message):
        evaluate(folder, **{"tokenizer": tokenizer_path(), "seq_len": 32, "steps": 1} | options)


def test_calibration_needs_a_batch(saved, tmp_path):
    _, folder = saved()
    with pytest.raises(ConfigError, match="calibration_batches 0"):
        finalize(folder, tmp_path / "out", FinalizeOptions("nvfp4", calibration_batches=0))
