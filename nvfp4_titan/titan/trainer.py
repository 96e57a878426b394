"""torchtitan's Trainer on any device: early checks, what the CPU needs, the run's record."""

import os
from pathlib import Path

import tomli
from torch import distributed
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.protocols.model_converter import _registry_model_converter_cls as CONVERTERS
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.train import Trainer
from torchtitan.train import main as torchtitan_main

from ..errors import ConfigError
from . import cpu_runtime, record
from .converter import check_settings
from .datasets import dataset_corpus

CONFIG_MODULE = "nvfp4_titan.titan.job_config"


class NVFP4Trainer(Trainer):
    """torchtitan's Trainer that checks its settings first and leaves a record of its run."""

    def __init__(self, job_config: JobConfig):
        # `--model.converters ""` is how a command line spells a TOML's empty list.
        job_config.model.converters = [name for name in job_config.model.converters if name]
        check(job_config)
        super().__init__(job_config)
        cpu_runtime.prepare_trainer(self.model_parts)
        if distributed.get_rank() == 0:
            record.write(job_config)

    def train(self) -> None:
        """Train; afterwards record how the tokens spread over experts."""
        super().train()
        if distributed.get_rank() == 0:
            record.write_tokens_per_expert(self.job_config, self.model_parts)


def run(argv: list[str]) -> None:
    """Train in this process, one rank, as torchtitan's command line says.

    Args:
        argv: torchtitan's options. The config module of nvfp4_titan is added where none is named.

    Raises:
        UserError: settings that cannot be used.
    """
    toml = _load_toml(argv)
    named = toml.get("job", {}).get("custom_config_module")
    if not named and not any("custom_config_module" in a.replace("-", "_") for a in argv):
        argv = [*argv, f"--job.custom_config_module={CONFIG_MODULE}"]
    _check_fields(argv)
    # torchtitan's main() reads sys.argv; ConfigManager binds it when it is defined.
    ConfigManager.parse_args.__defaults__ = (argv,)
    torchtitan_main(NVFP4Trainer)


def _load_toml(argv: list[str]) -> dict:
    """The job's TOML, {} where none is named."""
    keys = ("--job.config_file", "--job.config-file")
    path = None
    for i, arg in enumerate(argv):
        key, equals, value = arg.partition("=")
        if key in keys:
            path = value if equals else next(iter(argv[i + 1 :]), "")
    if path is None:
        return {}
    if not os.path.isfile(path):
        raise ConfigError(f"config file {path} is not there: see train_configs/ for examples")
    try:
        return tomli.loads(Path(path).read_text())
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from error


def _check_fields(argv: list[str]) -> None:
    """Have torchtitan parse the settings once, to name an unknown key in one line."""
    try:
        ConfigManager().parse_args(argv)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error


def check(job_config: JobConfig) -> None:
    """Settings that torchtitan would only trip over later, or with a KeyError.

    Raises:
        ConfigError: unknown model, flavor, converter or dataset; a folder that is not there.
    """
    model = job_config.model
    try:
        flavors = get_train_spec(model.name).model_args
    except ValueError as error:
        raise ConfigError(f"model.name {model.name!r} is unknown: {error}") from error
    if model.flavor not in flavors:
        raise ConfigError(
            f"model.flavor {model.flavor!r} is unknown for {model.name}: use one of "
            f"{', '.join(flavors)}"
        )
    for name in model.converters:
        if name not in CONVERTERS:
            raise ConfigError(f"converter {name!r} is unknown: use one of {', '.join(CONVERTERS)}")
    if not os.path.isdir(model.hf_assets_path):
        raise ConfigError(
            f"model.hf_assets_path {model.hf_assets_path} is not there: give the folder of a "
            f"tokenizer, or leave the key out for the built-in one"
        )
    if "nvfp4" in model.converters:
        check_settings(job_config)
    _check_dataset("training", job_config.training)
    if job_config.validation.enable:
        _check_dataset("validation", job_config.validation)


def _check_dataset(section: str, settings) -> None:
    name, path = settings.dataset.lower(), settings.dataset_path
    if name not in DATASETS:
        raise ConfigError(
            f"{section}.dataset {name!r} is unknown: use one of {', '.join(DATASETS)}"
        )
    if dataset_corpus(name, path) is not None:
        return  # built, or its own error raised
    # Hugging Face hub names ("allenai/c4") are not folders; every other path is.
    place = path or DATASETS[name].path
    on_hub = place.count("/") == 1 and not place.startswith((".", "/", "~"))
    if not on_hub and not os.path.exists(place):
        raise ConfigError(
            f"{section}.dataset_path {place} is not there: give an existing folder, or use "
            f"{section}.dataset = 'stdlib'"
        )
