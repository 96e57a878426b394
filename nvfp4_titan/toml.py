"""Reading a job's TOML."""

from pathlib import Path

import tomli

from .errors import ConfigError


def read_toml(path: Path) -> dict:
    """A job's TOML.

    Raises:
        ConfigError: it is not there, or no TOML.
    """
    if not path.is_file():
        raise ConfigError(f"config file {path} is not there: see train_configs/ for examples")
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from error
