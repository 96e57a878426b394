"""Registers the corpora with torchtitan: `stdlib`, `pysource`, and their `_validation` splits.

Named wherever torchtitan takes `training.dataset` or `validation.dataset`. With `dataset_path` they
take their Python files from that folder instead, or the corpus itself, where the folder is one that
was made before (of the cache, or copied from another machine's).
"""

import os
from functools import partial

from datasets import Dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.tools.logging import logger

from . import corpus

_ROOTS = {"stdlib": corpus.stdlib_roots, "pysource": corpus.pysource_roots}


def dataset_corpus(dataset: str, path: str | None) -> corpus.Corpus | None:
    """The corpus behind a dataset name of ours; None for torchtitan's own datasets."""
    name = dataset.lower().removesuffix("_validation")
    if name not in _ROOTS:
        return None
    if path is None or path == _built_in(name):
        return corpus.build(name, _ROOTS[name]())
    folder = os.path.expanduser(path)
    return corpus.made(folder) if corpus.is_made(folder) else corpus.build("folder", [folder])


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
