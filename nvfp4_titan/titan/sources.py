"""Where a model comes from: a run, one of its checkpoints, or a Hugging Face folder.

Weights are read one at a time, under torchtitan's names (an expert's as families.py has them).
"""

import copy
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import get_train_spec

from ..errors import ConfigError
from ..scalars import CONVERSION, RECORD
from . import checkpoints, models
from .families import Family, args_from_dict, family_of_config, family_of_run, split_experts

OWN_KEY = "nvfp4_titan"
"""Key of config.json under which finalize keeps what torchtitan needs to build the model."""
_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
"""Of a Hugging Face folder; a model that ties the two has the second alone."""


@dataclass(frozen=True)
class HFName:
    """A weight's Hugging Face name, and which of torchtitan's rows each of its rows is."""

    name: str
    rows: torch.Tensor | None


@dataclass(frozen=True)
class Stored:
    """Where a weight lies in a torchtitan checkpoint: in one of its own, or in one of all experts.

    Attributes:
        name: The parameter or buffer.
        shape: Its shape.
        expert: Which expert of it; None for the whole.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None


class Source:
    """A model's weights and what it was trained with.

    Attributes:
        path: The folder of the weights.
        family: Its Family.
        args: torchtitan's model args.
        record: run_record.json, {} where there is none.
        conversion: Entries of conversion.json, [] where there is none.
        config: config.json, {} where there is none.
        stored: Stored by name, in the model's order.
        shapes: Shape by name; one expert's is (N, K).
    """

    def __init__(self, path: Path):
        self.path, self.run = _locate(path)
        run = self.run
        self.record = _json(run / RECORD) if run else {}
        conversion = run and run / CONVERSION
        self.conversion = (
            _json(conversion)["entries"] if conversion and conversion.is_file() else []
        )
        self.config = {} if run else _json(self.path / "config.json")
        if run:
            self.family = family_of_run(self.record["config"]["model"]["name"])
        else:
            self.family = family_of_config(self.config)
        self.args = (
            _args_of_run(self.record, self.family)
            if run
            else _args_of_config(self.config, self.family)
        )
        self.adapter = self.family.adapter(self.args, None)
        with torch.device("meta"):
            model = self.family.model(self.args)
        self.stored, self._experts = {}, {}
        for name, tensor in model.state_dict().items():
            for part, where in _parts(name, tuple(tensor.shape)).items():
                self.stored[part] = where
        self.shapes = {
            name: where.shape if where.expert is None else where.shape[1:]
            for name, where in self.stored.items()
        }
        self._files = {} if run else _tensor_files(self.path)
        if run:
            self._check_checkpoint()

    @property
    def converters(self) -> list[str]:
        """The converters that the run had."""
        return self.record["config"]["model"]["converters"] if self.record else []

    @property
    def linears(self) -> list[str]:
        """FQNs of all linears, one expert's among them, in the model's order."""
        return [
            name.removesuffix(".weight")
            for name, shape in self.shapes.items()
            if len(shape) == 2 and name != "tok_embeddings.weight"
        ]

    @property
    def kept(self) -> set[str]:
        """FQNs of linears that the run kept in high precision."""
        names = (entry["fqn"] for entry in self.conversion if not entry["converted"])
        return {fqn for name in names for fqn in self._linears_of(name)}

    def _linears_of(self, name: str) -> list[str]:
        """A linear's FQN, or those of all experts of an expert weight."""
        if f"{name}.weight" in self.shapes:
            return [name]
        whole = (part for part, where in self.stored.items() if where.name == name)
        return [part.removesuffix(".weight") for part in whole]

    def hf_name(self, name: str) -> HFName:
        """Where a weight goes in a Hugging Face checkpoint."""
        where, shape = self.stored[name], self.shapes[name]
        if where.expert is not None:
            return HFName(self._expert_names(where.name, where.shape[0])[where.expert], None)
        if len(shape) != 2:
            return HFName(next(iter(self.adapter.to_hf({name: torch.empty(shape[0])}))), None)
        index = torch.arange(shape[0], dtype=torch.int32)[:, None].expand(shape)
        ((hf, mapped),) = self.adapter.to_hf({name: index}).items()
        rows = mapped[:, 0].long()
        return HFName(hf, None if torch.equal(rows, torch.arange(shape[0])) else rows)

    def _expert_names(self, name: str, count: int) -> list[str]:
        if name not in self._experts:
            self._experts[name] = list(self.adapter.to_hf({name: torch.empty(count, 2, 2)}))
        return self._experts[name]

    def weights(self, skip: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) one at a time, but those of the modules in `skip`.

        Held at a time is one parameter of the checkpoint: all experts' w1 of a layer, for one.
        """
        held: dict[str, torch.Tensor] = {}
        for name, where in self.stored.items():
            if name.removesuffix(".weight") in skip:
                continue
            if not self.record:
                yield name, self._read_hf(name)
                continue
            if where.name not in held:
                held = {where.name: torch.empty(where.shape)}
                dcp.load(held, checkpoint_id=str(self.path), no_dist=True)
            whole = held[where.name]
            # A copy, which keeps nothing else alive.
            yield name, whole if where.expert is None else whole[where.expert].clone()

    def _read_hf(self, name: str) -> torch.Tensor:
        hf = self.hf_name(name)
        tensor = self.read(hf.name)
        if tuple(tensor.shape) != self.shapes[name]:
            shape = self.shapes[name]
            raise ConfigError(f"{hf.name} is {tuple(tensor.shape)}, not {shape}: other model?")
        return titan_rows(tensor, hf)

    def read(self, name: str) -> torch.Tensor:
        """A tensor of a Hugging Face folder.

        Raises:
            ConfigError: it is not there.
        """
        if name == _HEAD and name not in self._files and self.config.get("tie_word_embeddings"):
            name = _EMBEDDINGS
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
        for where in self.stored.values():
            if where.name not in known:
                raise ConfigError(f"{self.path} has no {where.name}: it is of another model")
            size = tuple(known[where.name].size)
            if size != where.shape:
                raise ConfigError(
                    f"{where.name} of {self.path} is {size}, not {where.shape}: it is of another "
                    "model"
                )


def titan_rows(tensor: torch.Tensor, hf: HFName) -> torch.Tensor:
    """A tensor of a Hugging Face folder with its rows in torchtitan's order."""
    if hf.rows is None:
        return tensor
    return tensor[torch.argsort(hf.rows)]


def build_model(source: Source, dtype: torch.dtype, device: str) -> nn.Module:
    """The unquantized model with its weights."""
    with torch.device("meta"):
        model = source.family.model(source.args)
        split_experts(model)
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device(device))
    # Buffers stay: the rotary table is complex, biases of experts are fp32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def load_weights(source: Source, model: nn.Module, skip: Collection[str] = ()) -> None:
    """Copy every weight into a model, but those of the modules in `skip`."""
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in source.weights(skip):
            held[name].copy_(tensor)


def _locate(path: Path) -> tuple[Path, Path | None]:
    """The folder of the weights, and the dump folder of the run, None for Hugging Face's."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder: give a run, a checkpoint or a model")
    if (path / RECORD).is_file():
        folder = path / _json(path / RECORD)["config"]["checkpoint"]["folder"]
        steps = checkpoints.saved_steps(folder)
        if not steps:
            raise ConfigError(f"{folder} has no checkpoint: train with checkpoint.enable = true")
        newest = steps[max(steps)]
        if reason := checkpoints.fault(newest, resumable=False):
            raise ConfigError(
                f"{newest} is not whole: {reason}. Resume the run, which saves it again, or give "
                "the folder of an older step"
            )
        return newest, path
    if (path / "config.json").is_file():
        return path, None
    for parent in list(path.parents)[:2]:
        if (parent / RECORD).is_file():
            return path, parent
    raise ConfigError(
        f"{path} has neither {RECORD} (a run of -m nvfp4_titan.train, or its checkpoint "
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


def _parts(name: str, shape: tuple[int, ...]) -> dict[str, Stored]:
    """The weights that one tensor of a checkpoint holds, by the names they have here."""
    if len(shape) != 3:
        return {name: Stored(name, shape)}
    module, _, leaf = name.rpartition(".")
    return {f"{module}.{e}.{leaf}.weight": Stored(name, shape, e) for e in range(shape[0])}


def _args_of_run(run: dict, family: Family) -> BaseModelArgs:
    models.register()
    model, training = run["config"]["model"], run["config"]["training"]
    flavors = get_train_spec(family.name).model_args
    if model["flavor"] not in flavors:
        raise ConfigError(
            f"the run trained flavor {model['flavor']!r}, which this program does not know: "
            "register it as the run did"
        )
    args = copy.deepcopy(flavors[model["flavor"]])
    args.max_seq_len = training["seq_len"]
    return _ready(args)


def _args_of_config(config: dict, family: Family) -> BaseModelArgs:
    if OWN_KEY in config:
        return _ready(args_from_dict(family, config[OWN_KEY]["model_args"]))
    try:
        return _ready(family.from_config(config))
    except KeyError as error:
        raise ConfigError(
            f"config.json has no {error.args[0]}, which a {config['model_type']} model needs: take "
            "the file that the model came with"
        ) from error


def _ready(args: BaseModelArgs) -> BaseModelArgs:
    """Set what torchtitan takes from a job's config: plain causal attention, no expert parallel."""
    args.attn_type, args.moe_impl = "sdpa", "standard"
    return args


def args_dict(args: BaseModelArgs) -> dict:
    """Model args as JSON."""
    return asdict(args)
