"""Registers the corpora with torchtitan: `stdlib`, `pysource`, and their `_validation` splits.

Named wherever torchtitan takes `training.dataset` or `validation.dataset`. With `dataset_path` they
take their Python files from that folder instead, or the corpus itself, where the folder is one that
was made before (of the cache, or copied from another machine's).
"""

import os
from functools import cache, partial
from pathlib import Path

from datasets import Dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.tools.logging import logger

from . import corpus

_ROOTS = {"stdlib": corpus.stdlib_roots, "pysource": corpus.pysource_roots}


def dataset_corpus(dataset: str, path: str | None) -> corpus.Corpus | None:
    """The corpus behind a dataset name of ours; None for torchtitan's own datasets.

    A process goes by what it saw of the files first: looking at all of them takes a second or two.
    """
    name = dataset.lower().removesuffix("_validation")
    if name not in _ROOTS:
        return None
    if path is None or path == _built_in(name):
        return _built(name, tuple(_ROOTS[name]()), corpus.cache_root())
    folder = os.path.abspath(os.path.expanduser(path))
    if corpus.is_made(folder):
        return corpus.made(folder)
    return _built("folder", (folder,), corpus.cache_root())


@cache
def _built(name: str, roots: tuple[str, ...], cache_root: Path) -> corpus.Corpus:
    """The corpus of Python files, which lies under `cache_root`."""
    return corpus.build(name, roots)


def _built_in(name: str) -> str:
    """What stands for no path of the user's; no folder is called so."""
    return f"<built-in {name}>"


def register() -> None:
    """Add the dataset names; a second call changes nothing."""
    for name in _ROOTS:
        for split, suffix in (("train", ""), ("validation", "_validation")):
            DATASETS[f"{name}{suffix}"] = DatasetConfig(
                # torchtitan passes dataset_path, or else this.
                path=_built_in(name),
                loader=partial(_load, name, split),
                sample_processor=_text,
            )


def _load(name: str, split: str, path: str) -> Dataset:
    made = dataset_corpus(name, path)
    logger.info(
        f"Corpus {path} {split}: {made.files[split]} files, {made.bytes[split]:,} bytes, "
        f"sha256 {made.sha256}"
    )
    return made.load(split)


def _text(sample: dict[str, str]) -> str:
    return sample["text"]
