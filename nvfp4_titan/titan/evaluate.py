"""Evaluate: token-weighted loss and perplexity of a run, a checkpoint or a finalized model.

What was quantized and how is read from the model itself: a finalized checkpoint's config.json, or
nothing for a run, whose weights are then evaluated in high precision. Quantized linears multiply
what the checkpoint's codes and scales stand for, on any device.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataset
from tqdm import tqdm

from ..command import markdown_table, result_file
from ..deploy import DeployRecipe, get_deploy_recipe
from ..deploy.codecs import nvfp4
from ..deploy.layout import SUFFIXES, amax_of, from_layout
from ..deploy.modules import QuantizedLinear
from ..errors import ConfigError
from . import datasets
from .sources import OWN_KEY, Source, build_model, load_weights, titan_rows

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def check_device(name: str) -> None:
    """Check that torch can compute on a device.

    Raises:
        ConfigError: it cannot.
    """
    try:
        torch.empty(1, device=name).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}): try cpu or cuda") from error


def check_text(dataset: str, seq_len: int, batch: int, steps: int) -> None:
    """Check what `batches` takes, before a model is trained or loaded.

    Raises:
        ConfigError: a dataset that is unknown, or a number that cannot be used.
    """
    if seq_len < 1 or batch < 1 or steps < 0:
        raise ConfigError(
            f"seq_len {seq_len}, batch {batch}, steps {steps}: give 1 or more, and 0 or more steps"
        )
    datasets.register()
    if dataset.lower() not in DATASETS:
        raise ConfigError(f"dataset {dataset!r} is unknown: use one of {', '.join(DATASETS)}")


def batches(
    dataset: str, tokenizer: BaseTokenizer, seq_len: int, batch: int, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(batch, seq_len) int64 tokens and labels, at most `steps` of them; the last may be smaller.

    Args:
        dataset: torchtitan's or this project's name.
        tokenizer: Tokenizer.
        seq_len: Tokens of a sequence.
        batch: Sequences of a batch.
        steps: Number of batches; 0 is the whole dataset.

    Raises:
        ConfigError: as `check_text`, or a dataset that is not there.
    """
    check_text(dataset, seq_len, batch, steps)
    try:
        rows = iter(HuggingFaceTextDataset(dataset, None, tokenizer, seq_len))
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"dataset {dataset!r}: {' '.join(str(error).split())}") from error
    made = 0
    while steps == 0 or made < steps:
        pairs = list(islice(rows, batch))
        if not pairs:
            return
        yield torch.stack([x["input"] for x, _ in pairs]), torch.stack([y for _, y in pairs])
        made += 1


def load_model(
    path: Path, device: str = "cpu", dtype: str | None = None
) -> tuple[nn.Module, Source]:
    """A model as it is deployed, and where it came from.

    Args:
        path: A run's dump folder, one of its checkpoints, or a Hugging Face folder.
        device: Where it runs.
        dtype: "bfloat16" or "float32"; None: a finalized model's own, or what a Hugging Face
            config.json names; float32 for others.

    Raises:
        ConfigError: a folder that cannot be used, or one that another program quantized.
        UnsupportedError: a model of another family.
    """
    source = Source(path)
    own = source.config.get(OWN_KEY, {})
    if "quantization_config" in source.config and not own.get("recipe"):
        raise ConfigError(
            f"{path} was quantized by another program: evaluate it with transformers, or finalize "
            "the model that it came from"
        )
    # transformers 5 writes "dtype".
    name = dtype or source.config.get("torch_dtype") or source.config.get("dtype") or "float32"
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown: use bfloat16 or float32")
    model = build_model(source, DTYPES[name], device)
    recipe = get_deploy_recipe(own["recipe"]) if own.get("recipe") else None
    quantized = set(own.get("quantized", ()))
    for fqn in quantized:
        _set(model, fqn, _quantized_linear(source, fqn, recipe, DTYPES[name]).to(device))
    load_weights(source, model, skip=quantized)
    return model.eval(), source


def _quantized_linear(
    source: Source, fqn: str, recipe: DeployRecipe, dtype: torch.dtype
) -> QuantizedLinear:
    hf = source.hf_name(f"{fqn}.weight")
    prefix = hf.name.removesuffix("weight")
    names = SUFFIXES + (("weight",) if recipe.layout == "float-quantized" else ())
    tensors = {name: source.read(prefix + name) for name in names if source.has(prefix + name)}
    rows = source.shapes[f"{fqn}.weight"][0]
    static = tensors.pop("input_global_scale", None)
    missing = "weight" if recipe.layout == "float-quantized" else "weight_packed"
    if missing not in tensors:
        raise ConfigError(f"{source.path} has no tensor {prefix}{missing}: give a whole checkpoint")
    encoded = from_layout(tensors, recipe)
    encoded = {
        key: titan_rows(t, hf) if t.dim() and t.shape[0] == rows else t
        for key, t in encoded.items()
    }
    if static is not None and recipe.static_activation:
        recipe = replace(recipe, activation=nvfp4(amax=amax_of(static).item()))
    return QuantizedLinear(encoded, recipe, None, dtype)


def _set(model: nn.Module, fqn: str, module: nn.Module) -> None:
    parent, _, leaf = fqn.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@torch.no_grad()
def evaluate(
    path: Path,
    *,
    dataset: str = "stdlib_validation",
    seq_len: int = 256,
    batch: int = 4,
    steps: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    tokenizer: Path | None = None,
) -> dict:
    """Loss (nats per token) and perplexity of a model.

    Args:
        path: As `load_model` takes it.
        dataset: torchtitan's or this project's name.
        seq_len: Tokens of a sequence.
        batch: Sequences of a batch.
        steps: Number of batches; 0 is the whole dataset.
        device: Where to compute.
        dtype: As `load_model` takes it.
        tokenizer: Its folder; None: the run's, or the model's own.

    Returns:
        model, recipe, loss, perplexity, tokens, bytes of its tensors.

    Raises:
        ConfigError: a folder or a dataset that cannot be used.
    """
    check_device(device)
    check_text(dataset, seq_len, batch, steps)
    model, source = load_model(path, device, dtype)
    folder = tokenizer or (
        Path(source.record["config"]["model"]["hf_assets_path"]) if source.record else source.path
    )
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder} has no tokenizer.json: give its folder with --tokenizer")
    if seq_len > source.args.max_seq_len:
        raise ConfigError(
            f"seq_len {seq_len} is longer than the model's {source.args.max_seq_len}: give "
            f"--seq-len {source.args.max_seq_len} or less"
        )
    total, tokens = 0.0, 0
    encoder = HuggingFaceTokenizer(str(folder))
    progress = tqdm(
        batches(dataset, encoder, seq_len, batch, steps), total=steps or None, desc=path.name
    )
    for inputs, labels in progress:
        logits = model(inputs.to(device)).float()
        flat = labels.to(device).flatten()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), flat, reduction="sum")
        total, tokens = total + loss.item(), tokens + flat.numel()
        progress.set_postfix(loss=f"{total / tokens:.4f}")
    if not tokens:
        raise ConfigError(f"dataset {dataset!r} gave no sequence of {seq_len} tokens")
    loss = total / tokens
    if not math.isfinite(loss):
        raise ConfigError(
            f"the loss of {path} is not finite: its weights are damaged, or training diverged; "
            "take an earlier checkpoint"
        )
    recipe = source.config.get(OWN_KEY, {}).get("recipe") or "none"
    held = (*model.parameters(), *model.buffers())
    return {
        "model": str(path),
        "recipe": recipe,
        "loss": loss,
        "perplexity": math.exp(loss),
        "tokens": tokens,
        "bytes": sum(t.numel() * t.element_size() for t in held),
    }


def format_table(rows: dict[str, dict]) -> str:
    """Results by name as a Markdown table."""
    cells = [
        (name, r["recipe"], f"{r['loss']:.4f}", f"{r['perplexity']:.3f}", f"{r['tokens']:,}")
        for name, r in rows.items()
    ]
    return "\n".join(markdown_table(("model", "recipe", "loss", "perplexity", "tokens"), cells))


def write_results(output: Path, rows: dict[str, dict], about: dict) -> None:
    """Write OUTPUT.json, OUTPUT.md and OUTPUT.png.

    Args:
        output: Path without a suffix.
        rows: Results by name.
        about: What else the JSON says: command, device, versions.
    """
    from matplotlib.figure import Figure  # takes a second, which finalize need not wait

    result_file(output, ".json").write_text(json.dumps({"models": rows, **about}, indent=1) + "\n")
    result_file(output, ".md").write_text(format_table(rows) + "\n")
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.bar(list(rows), [row["perplexity"] for row in rows.values()])
    axes.bar_label(bars, fmt="%.3f")
    axes.set(ylabel="perplexity")
    figure.savefig(result_file(output, ".png"), dpi=120)
