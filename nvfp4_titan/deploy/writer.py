"""A checkpoint folder that appears complete or not at all, written a shard at a time."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import ConfigError

SHARD_BYTES = 4 * 2**30


class CheckpointWriter:
    """Collects tensors, writes each full shard, and moves the folder into place at the end.

    Used as a context manager: leaving it with an error removes what was written.

    Args:
        target: Folder that must not exist.
        binary: Whether shards are `.bin` files of torch.save and not safetensors.
        shard_bytes: Size of a shard at which it is written.

    Raises:
        ConfigError: the folder exists, or cannot be written.
    """

    def __init__(self, target: Path, *, binary: bool = False, shard_bytes: int = SHARD_BYTES):
        if target.exists():
            raise ConfigError(f"{target} exists: give a folder that does not, or remove it")
        self.target, self.binary, self.shard_bytes = target, binary, shard_bytes
        self.sizes: dict[str, int] = {}
        self._shards: list[list[str]] = []
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = 0

    def __enter__(self) -> "CheckpointWriter":
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.mkdtemp(prefix=f".{self.target.name}.", dir=self.target.parent)
        except OSError as error:
            raise ConfigError(
                f"{self.target.parent} cannot be written ({error.strerror}): give another folder"
            ) from error
        self.folder = Path(scratch)
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as failure:
            error = failure
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise ConfigError(
                f"{self.target} cannot be written ({reason}): free some space or give a folder on "
                "another disk; nothing was left there"
            ) from error

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor; a full shard is written."""
        self._pending[name] = tensor.detach().cpu().contiguous()
        self.sizes[name] = tensor.numel() * tensor.element_size()
        self._bytes += self.sizes[name]
        if self._bytes >= self.shard_bytes:
            self._write_shard()

    def write_text(self, name: str, text: str) -> None:
        """Write a text file beside the shards."""
        (self.folder / name).write_text(text)

    def copy(self, file: Path) -> None:
        """Copy a file beside the shards."""
        shutil.copy(file, self.folder / file.name)

    def _write_shard(self) -> None:
        file = self.folder / f"shard-{len(self._shards)}"
        try:
            if self.binary:
                torch.save(self._pending, file)
            else:
                save_file(self._pending, file, metadata={"format": "pt"})
        except (SafetensorError, RuntimeError) as error:
            # What both raise where the system refuses to write.
            raise OSError(str(error)) from error
        self._shards.append(list(self._pending))
        self._pending, self._bytes = {}, 0

    def _finish(self) -> None:
        if self._pending:
            self._write_shard()
        stem, suffix = ("pytorch_model", "bin") if self.binary else ("model", "safetensors")
        count = len(self._shards)
        names = [f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}" for i in range(count)]
        names = names if count > 1 else [f"{stem}.{suffix}"]
        for i, name in enumerate(names):
            # safetensors writes for its user alone; who serves a model may be another.
            os.chmod(self.folder / f"shard-{i}", 0o644)
            (self.folder / f"shard-{i}").rename(self.folder / name)
        if count > 1:
            index = {
                "metadata": {"total_size": sum(self.sizes.values())},
                "weight_map": {
                    key: name
                    for name, keys in zip(names, self._shards, strict=True)
                    for key in keys
                },
            }
            self.write_text(f"{stem}.{suffix}.index.json", json.dumps(index, indent=1))
        os.chmod(self.folder, 0o755)
        self.folder.rename(self.target)
