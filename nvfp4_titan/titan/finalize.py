"""Finalize: from a run (QAT, NVFP4 or bf16) or a Hugging Face model to a quantized checkpoint.

Weights are read, quantized in the run's compute dtype, and written one at a time. Only a static
scale of activations ("nvfp4") needs the whole model at once, to see them: `calibration_batches` of
training text run through it in high precision.

Engines that join q, k and v (or gate and up) into one GEMM take one scale per tensor for all: the
NVFP4 codes of such weights are made with the largest amax among them. A run of the qat converter
trains so too, unless it was told not to.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from ..command import check_writable
from ..deploy import DeployRecipe, get_deploy_recipe
from ..deploy.codecs import nvfp4
from ..deploy.layout import quantization_config, to_layout
from ..deploy.writer import SHARD_BYTES, CheckpointWriter
from ..errors import ConfigError
from ..formats import BLOCK
from ..recipe import DEFAULT_RULES
from ..scalars import VALIDATION_LOSS, read_scalars
from .evaluate import DTYPES, batches, check_device
from .families import FUSED
from .sources import OWN_KEY, Source, args_dict, build_model, load_weights

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
            A QAT run's own codes need that of its GEMMs.
        skip: Globs of modules that stay in high precision; of a run that converted modules, those
            that it kept stay so too.
        share_scales: Whether linears that inference engines fuse get one NVFP4 scale per tensor.
            None: of a QAT run, as it trained; else they do.
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
    share_scales: bool | None = None
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
        ConfigError: a folder that cannot be used, or options that do not match the run.
        UnsupportedError: a model of another family.
    """
    if options.dtype not in DTYPES:
        raise ConfigError(f"dtype {options.dtype!r} is unknown: use bfloat16 or float32")
    if options.calibration_batches < 1:
        raise ConfigError(f"calibration_batches {options.calibration_batches}: give 1 or more")
    check_device(options.device)
    if output.exists():
        raise ConfigError(f"{output} exists: give a folder that does not, or remove it")
    source = Source(path)
    if "quantization_config" in source.config or source.config.get(OWN_KEY, {}).get("recipe"):
        raise ConfigError(f"{path} is quantized already: finalize the model that it came from")
    recipe = None if options.recipe == "bf16" else get_deploy_recipe(options.recipe)
    options = _as_trained(source, options)
    chosen = _chosen(source, recipe, options.skip)
    tokenizer = _tokenizer(source, options.tokenizer)
    check_writable(output)  # before the calibration
    amaxes: dict[str, torch.Tensor] = {}
    if recipe and recipe.static_activation:
        amaxes = calibrate(source, chosen, tokenizer, options)
    shared = shared_amaxes(source, chosen, options) if shares_scales(recipe, options) else {}
    binary = recipe is not None and recipe.layout is None
    with CheckpointWriter(output, binary=binary, shard_bytes=options.shard_bytes) as writer:
        sizes = _write_weights(source, writer, recipe, chosen, (amaxes, shared), options)
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


def _as_trained(source: Source, options: FinalizeOptions) -> FinalizeOptions:
    """The options, with scales shared as they were: a QAT run is quantized as it trained, or not.

    Raises:
        ConfigError: it is to be quantized in another way.
    """
    share = options.share_scales
    if "qat" not in source.converters:
        return replace(options, share_scales=share is None or share)
    qat = source.record["config"]["qat"]
    if options.recipe not in (qat["recipe"], "bf16"):
        raise ConfigError(
            f"the run was trained for {qat['recipe']!r}, not {options.recipe!r}: use --quantize "
            f"{qat['recipe']}"
        )
    if options.recipe != "bf16" and share not in (None, qat["share_scales"]):
        raise ConfigError(
            f"the run trained with share_scales = {qat['share_scales']}, not {share}: its codes "
            "would be others; leave share_scales out"
        )
    return replace(options, share_scales=qat["share_scales"])


def _chosen(source: Source, recipe: DeployRecipe | None, skip: tuple[str, ...]) -> set[str]:
    """FQNs of the linears that are quantized."""
    if recipe is None:
        return set()
    linears = source.linears
    unused = [glob for glob in skip if not any(fnmatchcase(fqn, glob) for fqn in linears)]
    if unused:
        raise ConfigError(f"skip {unused[0]!r} matches no linear; names look like {linears[0]}")
    if source.conversion:
        kept = source.kept
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
    if not (folder / "tokenizer.json").is_file():
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
    return found | _of_idle_experts(found, chosen)


def _of_idle_experts(found: dict[str, torch.Tensor], chosen: set[str]) -> dict[str, torch.Tensor]:
    """For experts that were given no token, the largest amax of their layer's others."""
    layers = defaultdict(list)
    for fqn in chosen:
        experts, _, expert = fqn.rpartition(".")
        layers[experts.rpartition(".")[0], expert].append(fqn)
    idle = {}
    for members in layers.values():
        seen = [found[fqn] for fqn in members if fqn in found]
        for fqn in members:
            if fqn not in found and seen:
                idle[fqn] = torch.stack(seen).amax()
    if missing := chosen - found.keys() - idle.keys():
        raise ConfigError(f"calibration never reached {min(missing)}: raise calibration_batches")
    return idle


def shares_scales(recipe: DeployRecipe | None, options: FinalizeOptions) -> bool:
    """Whether there are scales per tensor, and they are to be shared."""
    return recipe is not None and recipe.tensor_scale and bool(options.share_scales)


@torch.no_grad()
def shared_amaxes(
    source: Source, chosen: set[str], options: FinalizeOptions
) -> dict[str, torch.Tensor]:
    """The amax, fp32 (), of each chosen linear that is fused with others: their largest."""
    groups = []
    for parent in {fqn.rpartition(".")[0] for fqn in chosen}:
        for names in FUSED:
            members = [f"{parent}.{name}" for name in names if f"{parent}.{name}" in chosen]
            if len(members) > 1:
                groups.append(members)
    wanted = {fqn for members in groups for fqn in members}
    others = {name.removesuffix(".weight") for name in source.shapes} - wanted
    own = {
        name.removesuffix(".weight"): tensor.to(DTYPES[options.dtype]).abs().amax().float()
        for name, tensor in source.weights(skip=others)
    }
    largest = {}
    for members in groups:
        amax = torch.stack([own[fqn] for fqn in members]).amax()
        largest |= dict.fromkeys(members, amax)
    return largest


@torch.no_grad()
def _write_weights(
    source: Source,
    writer: CheckpointWriter,
    recipe: DeployRecipe | None,
    chosen: set[str],
    amaxes: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
    options: FinalizeOptions,
) -> dict[str, int]:
    """Quantize and write; `amaxes` are those of inputs and the shared ones of weights."""
    of_inputs, shared = amaxes
    sizes = {"quantized": 0, "quantized_as_bf16": 0}
    for name, tensor in source.weights():
        hf = source.hf_name(name)
        fqn = name.removesuffix(".weight")
        # Biases of experts, which only choose, stay in fp32.
        dtype = DTYPES[options.dtype] if name.endswith(".weight") else tensor.dtype
        tensor = tensor.to(options.device, dtype)
        if not bool(tensor.isfinite().all()):
            raise ConfigError(
                f"{name} of {source.path} is not finite: the checkpoint is damaged, or its "
                "training diverged; finalize an earlier one"
            )
        if fqn not in chosen:
            writer.add(hf.name, tensor if hf.rows is None else tensor[hf.rows.to(tensor.device)])
            continue
        codec = recipe.weight
        if fqn in shared:
            codec = nvfp4(block_rows=BLOCK, amax=shared[fqn].item())
        encoded = codec.encode(tensor)
        if hf.rows is not None:
            encoded = {key: _permuted(t, hf.rows) for key, t in encoded.items()}
        stored = to_layout(encoded, recipe, of_inputs.get(fqn))
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
    """config.json."""
    args, family = source.args, source.family
    tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = {
        "architectures": [family.architecture],
        "model_type": family.hf_type,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "torch_dtype": options.dtype,
        **family.to_config(args),
        **{key: source.config.get(key, value) for key, value in tokens.items()},
        OWN_KEY: {"model_args": args_dict(args), "recipe": recipe and recipe.name},
    }
    config[OWN_KEY]["quantized"] = [fqn for fqn in source.linears if fqn in chosen]
    if recipe and recipe.layout:
        ignore = [
            source.hf_name(f"{fqn}.weight").name.removesuffix(".weight")
            for fqn in source.linears
            if fqn not in chosen
        ]
        config["quantization_config"] = quantization_config(recipe, ignore)
    return config


def _card(source: Source, options: FinalizeOptions, config: dict, sizes: dict[str, int]) -> str:
    """README.md of the checkpoint."""
    steps = source.path.name if source.record else "a Hugging Face checkpoint"
    trained = ", ".join(source.converters) or "no converter (quantized after training)"
    if "qat" in source.converters:
        config_of_run = source.record["config"]
        trained = f"qat, recipe {config_of_run['qat']['recipe']}"
        dtype = config_of_run["training"]["mixed_precision_param"]
        if dtype != options.dtype:
            trained += f", in {dtype}: its codes were others than these, made in {options.dtype}"
    lines = [
        "# Quantized checkpoint",
        "",
        f"- recipe: `{options.recipe}`",
        f"- layout: {config.get('quantization_config', {}).get('format', 'torch .bin')}",
        f"- source: {(source.run or source.path).resolve().name}, {steps}",
        f"- trained with: {trained}",
        f"- quantized linears: {len(config[OWN_KEY]['quantized'])}, {sizes['quantized']:,} bytes",
        f"- the same in bf16: {sizes['quantized_as_bf16']:,} bytes",
        f"- all tensors: {sizes['total']:,} bytes",
    ]
    if source.record:
        lines.append(f"- training steps: {source.record['config']['training']['steps']}")
        lines.append(f"- training data: {source.record['datasets']['training'][0]}")
        lines += _validation(source)
    return "\n".join(lines) + "\n"


def _validation(source: Source) -> list[str]:
    """The last validation loss of the run, where it had one: of the model as it was trained."""
    if not any(source.run.glob("tb/*/events.out.tfevents.*")):
        return []
    losses = read_scalars(source.run).get(VALIDATION_LOSS, {})
    if not losses:
        return []
    step = max(losses)
    return [f"- validation loss of the run at step {step}: {losses[step]:.4f}"]
