"""Reading a job's TOML."""

import hashlib
import json
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


def toml_sha256(path: Path) -> str:
    """SHA-256 of what a TOML says, in hex; not of how it is written."""
    said = json.dumps(read_toml(path), sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()
