"""Where a model comes from: a run, one of its checkpoints, or a Hugging Face folder.

Weights are read one at a time, under torchtitan's names. Llama3 alone: other models have no
config.json writer here.
"""

import copy
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.train_spec import get_train_spec

from ..errors import ConfigError, UnsupportedError
from . import checkpoints, record

OWN_KEY = "nvfp4_titan"
"""Key of config.json under which finalize keeps what torchtitan needs to build the model."""


@dataclass(frozen=True)
class HFName:
    """A weight's Hugging Face name, and which of torchtitan's rows each of its rows is."""

    name: str
    rows: torch.Tensor | None


class Source:
    """A model's weights and what it was trained with.

    Attributes:
        path: The folder of the weights.
        args: torchtitan's model args.
        record: run_record.json, {} where there is none.
        conversion: Entries of conversion.json, [] where there is none.
        config: config.json, {} where there is none.
    """

    def __init__(self, path: Path):
        self.path, run = _locate(path)
        self.record = _json(run / record.FILE) if run else {}
        conversion = run and run / record.CONVERSION_FILE
        self.conversion = (
            _json(conversion)["entries"] if conversion and conversion.is_file() else []
        )
        self.config = {} if run else _json(self.path / "config.json")
        self.args = _args_of_run(self.record) if run else _args_of_config(self.config)
        self.adapter = Llama3StateDictAdapter(self.args, None)
        with torch.device("meta"):
            model = Transformer(self.args)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._files = {} if run else _tensor_files(self.path)
        if run:
            self._check_checkpoint()

    @property
    def converters(self) -> list[str]:
        """The converters that the run had."""
        return self.record["config"]["model"]["converters"] if self.record else []

    def hf_name(self, name: str) -> HFName:
        """Where a weight goes in a Hugging Face checkpoint."""
        shape = self.shapes[name]
        if len(shape) != 2:
            return HFName(next(iter(self.adapter.to_hf({name: torch.empty(shape[0])}))), None)
        index = torch.arange(shape[0], dtype=torch.int32)[:, None].expand(shape)
        ((hf, mapped),) = self.adapter.to_hf({name: index}).items()
        rows = mapped[:, 0].long()
        return HFName(hf, None if torch.equal(rows, torch.arange(shape[0])) else rows)

    def weights(self, skip: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """(torchtitan's name, tensor) one at a time, but those of the modules in `skip`."""
        for name, shape in self.shapes.items():
            if name.removesuffix(".weight") in skip:
                continue
            if self.record:
                tensor = {name: torch.empty(shape)}
                dcp.load(tensor, checkpoint_id=str(self.path), no_dist=True)
                yield name, tensor[name]
                continue
            hf = self.hf_name(name)
            tensor = self.read(hf.name)
            if tuple(tensor.shape) != shape:
                raise ConfigError(f"{hf.name} is {tuple(tensor.shape)}, not {shape}: other model?")
            yield name, titan_rows(tensor, hf)

    def read(self, name: str) -> torch.Tensor:
        """A tensor of a Hugging Face folder.

        Raises:
            ConfigError: it is not there.
        """
        if name not in self._files:
            raise ConfigError(f"{self.path} has no tensor {name}: give a whole checkpoint")
        file = self._files[name]
        if file.suffix == ".bin":
            return torch.load(file, mmap=True, weights_only=True)[name]
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)

    def has(self, name: str) -> bool:
        """Whether a Hugging Face folder has a tensor."""
        return name in self._files

    def _check_checkpoint(self) -> None:
        reason = checkpoints.fault(self.path, resumable=False)
        if reason:
            raise ConfigError(f"{self.path} cannot be used: {reason}; give another step's folder")
        known = FileSystemReader(self.path).read_metadata().state_dict_metadata
        missing = [name for name in self.shapes if name not in known]
        if missing:
            raise ConfigError(f"{self.path} has no {missing[0]}: it is of another model")


def titan_rows(tensor: torch.Tensor, hf: HFName) -> torch.Tensor:
    """A tensor of a Hugging Face folder with its rows in torchtitan's order."""
    if hf.rows is None:
        return tensor
    return tensor[torch.argsort(hf.rows)]


def build_model(source: Source, dtype: torch.dtype, device: str) -> nn.Module:
    """The unquantized model with its weights."""
    with torch.device("meta"):
        model = Transformer(source.args)
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device(device))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(dtype)
    for name, buffer in buffers.items():  # the rotary table is complex
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = buffer
    return model


def load_weights(source: Source, model: nn.Module) -> None:
    """Copy every weight into a model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in source.weights():
            parameters[name].copy_(tensor)


def _locate(path: Path) -> tuple[Path, Path | None]:
    """The folder of the weights, and the dump folder of the run, None for Hugging Face's."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder: give a run, a checkpoint or a model")
    if (path / record.FILE).is_file():
        folder = path / _json(path / record.FILE)["config"]["checkpoint"]["folder"]
        steps = sorted(
            (int(entry.name.removeprefix("step-")) for entry in folder.glob("step-*")), reverse=True
        )
        for step in steps:
            if checkpoints.fault(folder / f"step-{step}", resumable=False) is None:
                return folder / f"step-{step}", path
        raise ConfigError(f"{folder} has no whole checkpoint: train with checkpoint.enable = true")
    if (path / "config.json").is_file():
        return path, None
    for parent in list(path.parents)[:2]:
        if (parent / record.FILE).is_file():
            return path, parent
    raise ConfigError(
        f"{path} has neither {record.FILE} (a run of -m nvfp4_titan.train, or its checkpoint "
        "inside) nor config.json (a Hugging Face model)"
    )


def _tensor_files(path: Path) -> dict[str, Path]:
    found = {}
    for file in sorted((*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin"))):
        try:
            if file.suffix == ".bin":
                names = list(torch.load(file, mmap=True, weights_only=True))
            else:
                with safe_open(file, "pt") as opened:
                    names = list(opened.keys())
        except (SafetensorError, RuntimeError, EOFError) as error:
            raise ConfigError(
                f"{file} cannot be read ({error}): it is cut short; copy it again"
            ) from error
        found |= dict.fromkeys(names, file)
    if not found:
        raise ConfigError(f"{path} has no safetensors files: give a whole checkpoint")
    return found


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give a whole folder") from error


def _args_of_run(run: dict) -> TransformerModelArgs:
    model, training = run["config"]["model"], run["config"]["training"]
    if model["name"] != "llama3":
        raise UnsupportedError(
            f"the run trained {model['name']}: only llama3 models are finalized in this version; "
            "export others with torchtitan's own Hugging Face checkpoints"
        )
    args = copy.deepcopy(get_train_spec("llama3").model_args[model["flavor"]])
    args.max_seq_len = training["seq_len"]
    return args


def _args_of_config(config: dict) -> TransformerModelArgs:
    if OWN_KEY in config:
        given = dict(config[OWN_KEY]["model_args"])
        given["rope_scaling_args"] = RoPEScalingArgs(**given["rope_scaling_args"])
        return TransformerModelArgs(**given)
    if config.get("model_type") != "llama":
        raise UnsupportedError(
            f"model_type {config.get('model_type')!r}: only llama models are read in this version"
        )
    dim, hidden = config["hidden_size"], config["intermediate_size"]
    base = int(2 * 4 * dim / 3)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
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


def args_dict(args: TransformerModelArgs) -> dict:
    """Model args as JSON."""
    names = {field.name for field in fields(TransformerModelArgs)}
    return {name: value for name, value in asdict(args).items() if name in names}
