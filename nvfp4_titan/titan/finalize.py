"""Finalize: from a run (QAT, NVFP4 or bf16) or a Hugging Face model to a quantized checkpoint.

Weights are read, quantized in the run's compute dtype, and written one at a time. Only a static
scale of activations ("nvfp4") needs the whole model at once, to see them: `calibration_batches` of
training text run through it in high precision.
"""

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from ..deploy import DeployRecipe, get_deploy_recipe
from ..deploy.layout import quantization_config, to_layout
from ..deploy.writer import SHARD_BYTES, CheckpointWriter
from ..errors import ConfigError
from ..recipe import DEFAULT_RULES
from .evaluate import batches
from .sources import OWN_KEY, Source, args_dict, build_model, load_weights

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class FinalizeOptions:
    """How a model is finalized.

    Attributes:
        recipe: Name in `DEPLOY_RECIPES`, or "bf16" for none.
        dtype: "bfloat16" or "float32": of what is not quantized, and of w when it is quantized.
        skip: Globs of modules that stay in high precision; of a run that converted modules, those
            that it kept stay so too.
        tokenizer: Folder of the tokenizer; None: the run's, or the model's own.
        calibration_dataset: torchtitan's name of the text that static scales are taken from.
        calibration_batches: Batches of it.
        seq_len: Tokens of a sequence of it.
        device: Where to compute.
        shard_bytes: Size at which a shard is written.
    """

    recipe: str
    dtype: str = "bfloat16"
    skip: tuple[str, ...] = ()
    tokenizer: Path | None = None
    calibration_dataset: str = "stdlib"
    calibration_batches: int = 8
    seq_len: int = 256
    device: str = "cpu"
    shard_bytes: int = SHARD_BYTES


def finalize(path: Path, output: Path, options: FinalizeOptions) -> dict:
    """Write a checkpoint folder; it appears complete or not at all, and the source stays as it is.

    Args:
        path: A run's dump folder, one of its checkpoints, or a Hugging Face folder.
        output: Folder that must not exist.
        options: FinalizeOptions.

    Returns:
        Sizes: bytes of the quantized linears, the same in bf16, and of everything.

    Raises:
        ConfigError: a folder that cannot be used, or a recipe that does not match the run.
        UnsupportedError: a model other than Llama3.
    """
    if options.dtype not in DTYPES:
        raise ConfigError(f"dtype {options.dtype!r} is unknown: use bfloat16 or float32")
    if output.exists():
        raise ConfigError(f"{output} exists: give a folder that does not, or remove it")
    source = Source(path)
    if "quantization_config" in source.config or source.config.get(OWN_KEY, {}).get("recipe"):
        raise ConfigError(f"{path} is quantized already: finalize the model that it came from")
    recipe = None if options.recipe == "bf16" else get_deploy_recipe(options.recipe)
    _check_run(source, options.recipe)
    chosen = _chosen(source, recipe, options.skip)
    tokenizer = _tokenizer(source, options.tokenizer)
    amaxes: dict[str, torch.Tensor] = {}
    if recipe and recipe.name == "nvfp4":
        amaxes = calibrate(source, chosen, tokenizer, options)
    binary = recipe is not None and recipe.layout is None
    with CheckpointWriter(output, binary=binary, shard_bytes=options.shard_bytes) as writer:
        sizes = _write_weights(source, writer, recipe, chosen, amaxes, options)
        config = _config(source, recipe, chosen, options, HuggingFaceTokenizer(str(tokenizer)))
        writer.write_text("config.json", json.dumps(config, indent=1))
        for name in _TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                writer.copy(tokenizer / name)
        if not (tokenizer / "generation_config.json").is_file():
            generation = {
                "bos_token_id": config["bos_token_id"],
                "eos_token_id": config["eos_token_id"],
            }
            writer.write_text("generation_config.json", json.dumps(generation, indent=1))
        writer.write_text("README.md", _card(source, options, config, sizes))
    return sizes


def _check_run(source: Source, recipe: str) -> None:
    """A QAT run is finalized with the recipe that it was trained for, or not quantized."""
    if "qat" not in source.converters:
        return
    trained = source.record["config"]["qat"]["recipe"]
    if recipe not in (trained, "bf16"):
        raise ConfigError(
            f"the run was trained for {trained!r}, not {recipe!r}: use --quantize {trained}"
        )


def _chosen(source: Source, recipe: DeployRecipe | None, skip: tuple[str, ...]) -> set[str]:
    """FQNs of the linears that are quantized."""
    if recipe is None:
        return set()
    linears = [
        name.removesuffix(".weight")
        for name, shape in source.shapes.items()
        if len(shape) == 2 and name != "tok_embeddings.weight"
    ]
    unused = [glob for glob in skip if not any(fnmatchcase(fqn, glob) for fqn in linears)]
    if unused:
        raise ConfigError(f"skip {unused[0]!r} matches no linear; names look like {linears[0]}")
    if source.conversion:
        kept = {entry["fqn"] for entry in source.conversion if not entry["converted"]}
    else:
        kept = {fqn for fqn in linears if any(rule.matches((fqn,)) for rule in DEFAULT_RULES)}
    chosen = {
        fqn
        for fqn in linears
        if fqn not in kept and not any(fnmatchcase(fqn, glob) for glob in skip)
    }
    if not chosen:
        raise ConfigError("no linear is left to quantize: loosen skip, or use --quantize bf16")
    for fqn in sorted(chosen):
        recipe.weight.check(source.shapes[f"{fqn}.weight"][1], fqn)
    return chosen


def _tokenizer(source: Source, given: Path | None) -> Path:
    folder = given
    if folder is None and source.record:
        folder = Path(source.record["config"]["model"]["hf_assets_path"])
    folder = folder or source.path
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise ConfigError(f"{folder} has no tokenizer.json: give its folder with --tokenizer")
    return folder


@torch.no_grad()
def calibrate(
    source: Source, chosen: set[str], tokenizer: Path, options: FinalizeOptions
) -> dict[str, torch.Tensor]:
    """Static amax of the input of each chosen linear, fp32 (), over some training text."""
    model = build_model(source, DTYPES[options.dtype], options.device)
    load_weights(source, model)
    found: dict[str, torch.Tensor] = {}

    def observe(fqn: str, x: torch.Tensor) -> None:
        amax = x.detach().abs().amax().float()
        found[fqn] = torch.maximum(found[fqn], amax) if fqn in found else amax

    for fqn in chosen:
        module = model.get_submodule(fqn)
        module.register_forward_pre_hook(lambda m, args, fqn=fqn: observe(fqn, args[0]))
    seq_len = min(options.seq_len, source.args.max_seq_len)
    encoder = HuggingFaceTokenizer(str(tokenizer))
    text = batches(options.calibration_dataset, encoder, seq_len, 4, options.calibration_batches)
    for tokens, _ in text:
        model(tokens.to(options.device))
    if not found:
        raise ConfigError("calibration saw no text: raise calibration_batches")
    return found


@torch.no_grad()
def _write_weights(
    source: Source,
    writer: CheckpointWriter,
    recipe: DeployRecipe | None,
    chosen: set[str],
    amaxes: dict[str, torch.Tensor],
    options: FinalizeOptions,
) -> dict[str, int]:
    sizes = {"quantized": 0, "quantized_as_bf16": 0}
    for name, tensor in source.weights():
        hf = source.hf_name(name)
        fqn = name.removesuffix(".weight")
        tensor = tensor.to(options.device, DTYPES[options.dtype])
        if fqn not in chosen:
            writer.add(hf.name, tensor if hf.rows is None else tensor[hf.rows.to(tensor.device)])
            continue
        encoded = recipe.weight.encode(tensor)
        if hf.rows is not None:
            encoded = {key: _permuted(t, hf.rows) for key, t in encoded.items()}
        stored = to_layout(encoded, recipe, amaxes.get(fqn))
        prefix = hf.name.removesuffix("weight")
        for suffix, part in stored.items():
            writer.add(prefix + suffix, part)
            sizes["quantized"] += writer.sizes[prefix + suffix]
        sizes["quantized_as_bf16"] += 2 * tensor.numel()
    return sizes | {"total": sum(writer.sizes.values())}


def _permuted(t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows in another order; a scale per tensor stays."""
    if t.dim() == 0:
        return t
    as_bytes = t.view(torch.uint8) if t.element_size() == 1 else t  # indexing lacks float8
    return as_bytes[rows.to(t.device)].view(t.dtype)


def _config(
    source: Source,
    recipe: DeployRecipe | None,
    chosen: set[str],
    options: FinalizeOptions,
    tokenizer: HuggingFaceTokenizer,
) -> dict:
    """config.json of a Llama model."""
    args = source.args
    rope = args.rope_scaling_args
    hidden = source.shapes["layers.0.feed_forward.w1.weight"][0]
    tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": hidden,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads or args.n_heads,
        "head_dim": args.dim // args.n_heads,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "hidden_act": "silu",
        "rope_theta": args.rope_theta,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": rope.scaling_factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        },
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": options.dtype,
        **{key: source.config.get(key, value) for key, value in tokens.items()},
        OWN_KEY: {"model_args": args_dict(args), "recipe": recipe and recipe.name},
    }
    linears = {
        source.hf_name(name).name.removesuffix(".weight"): name.removesuffix(".weight")
        for name, shape in source.shapes.items()
        if len(shape) == 2 and name != "tok_embeddings.weight"
    }
    config[OWN_KEY]["quantized"] = sorted(fqn for fqn in linears.values() if fqn in chosen)
    if recipe and recipe.layout:
        ignore = [hf for hf, fqn in linears.items() if fqn not in chosen]
        config["quantization_config"] = quantization_config(recipe, ignore)
    return config


def _card(source: Source, options: FinalizeOptions, config: dict, sizes: dict[str, int]) -> str:
    """README.md of the checkpoint."""
    steps = source.path.name if source.record else "a Hugging Face checkpoint"
    trained = ", ".join(source.converters) or "no converter (quantized after training)"
    if "qat" in source.converters:
        trained = f"qat, recipe {source.record['config']['qat']['recipe']}"
    lines = [
        "# Quantized checkpoint",
        "",
        f"- recipe: `{options.recipe}`",
        f"- layout: {config.get('quantization_config', {}).get('format', 'torch .bin')}",
        f"- source: {source.path.parent.parent.name or source.path.name}, {steps}",
        f"- trained with: {trained}",
        f"- quantized linears: {len(config[OWN_KEY]['quantized'])}, {sizes['quantized']:,} bytes",
        f"- the same in bf16: {sizes['quantized_as_bf16']:,} bytes",
        f"- all tensors: {sizes['total']:,} bytes",
    ]
    if source.record:
        lines.append(f"- training steps: {source.record['config']['training']['steps']}")
        lines.append(f"- training data: {source.record['datasets']['training'][0]}")
    return "\n".join(lines) + "\n"
