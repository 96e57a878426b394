"""Real text on any machine without a download: Python sources, and a BPE tokenizer trained on them.

A corpus is the UTF-8 `.py` files under some folders, without tests: `stdlib` the running Python's
standard library (about 13 MB), `pysource` everything on sys.path (hundreds of MB on a usual
training machine). One file in 20 is held out for validation. What is read is pieces of files, cut
at line ends: a batch of torchtitan's is consecutive text, and would be of one file where files are
long (half the bytes of `pysource` are in files of more than 32 KB). Files and pieces are told apart
and ordered by the SHA-256 of their content: duplicates are dropped, neighbours come from different
files, and the order is the same everywhere. What files share but for an insertion before it is no
duplicate: about a seventh of the held-out text is in training files too (docs/convergence.md).

Made once under the user's cache folder, by one process (others wait for its lock), and moved into
place complete. Contents differ between Python versions, so the corpus carries its own hash.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_from_disk
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..errors import ConfigError

VERSION = 3
"""Part of every cache path: raise it when what is written changes."""
VOCAB_SIZE = 2048
"""Vocabulary of torchtitan's debug models."""
VALIDATION_SHARE = 1 / 20
PIECE = 8192
"""Characters of a piece at most: about 2,800 tokens, more than a sequence of the small configs."""
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
_RECORD = "corpus.json"
_HASHED_BYTES = 2**20

_TEST_FOLDERS = {"test", "tests", "idle_test", "__pycache__"}
_STDLIB_EXCLUDES = {"site-packages", "dist-packages"}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk.

    Attributes:
        path: Folder that holds `train` and `validation` (datasets on disk) and `corpus.json`.
        sha256: Hash over the hashes of all pieces, in order.
        files: Number of files in each split.
        pieces: Number of pieces, the rows of each split.
        bytes: UTF-8 bytes in each split.
    """

    path: Path
    sha256: str
    files: dict[str, int]
    pieces: dict[str, int]
    bytes: dict[str, int]

    def load(self, split: str) -> Dataset:
        """A split as a map-style dataset with one column, "text", one piece a row."""
        return load_from_disk(str(self.path / split))


def cache_root() -> Path:
    """$XDG_CACHE_HOME/nvfp4_titan, or ~/.cache/nvfp4_titan."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nvfp4_titan"


def stdlib_roots() -> list[str]:
    """The folder of the running Python's standard library."""
    return [sysconfig.get_paths()["stdlib"]]


def pysource_roots() -> list[str]:
    """Every folder on sys.path, but the current one."""
    roots = {os.path.realpath(entry) for entry in sys.path if os.path.isdir(entry or os.devnull)}
    return sorted(roots - {os.path.realpath(os.getcwd())})


def build(name: str, roots: Sequence[str]) -> Corpus:
    """The corpus of the Python files under `roots`, made now or taken from the cache.

    Args:
        name: Prefix of the cache folder.
        roots: Folders, searched with their subfolders.

    Raises:
        ConfigError: a folder is not there, or holds no Python files.
    """
    for root in roots:
        if not os.path.isdir(root):
            what = "is not a folder" if os.path.exists(root) else "is not there"
            raise ConfigError(f"dataset folder {root!r} {what}: give an existing folder")
    roots = sorted(os.path.realpath(root) for root in roots)
    # Place, size and time of every file: a changed tree gets a new corpus.
    listing = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for path in _python_files(name, roots)
    ]
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
    target = cache_root() / f"{name}-v{VERSION}-{digest}"
    _make_once(target, lambda folder: _write_corpus(folder, [path for path, *_ in listing], roots))
    return made(target)


def is_made(folder: Path | str) -> bool:
    """Whether a folder is a corpus that `build` made, or a copy of one."""
    return Path(folder, _RECORD).is_file() and Path(folder, MANIFEST).is_file()


def made(folder: Path | str) -> Corpus:
    """The corpus in a folder that `build` made, or in a copy of one from another machine.

    Raises:
        ConfigError: its files are not those of its manifest.
    """
    if not _intact(folder := Path(folder)):
        raise ConfigError(f"the corpus in {folder} is damaged: copy it again")
    return Corpus(folder, **json.loads((folder / _RECORD).read_text()))


def tokenizer_path() -> Path:
    """Folder of the 2,048-token BPE tokenizer of the stdlib's training split, made if missing.

    It holds tokenizer.json and tokenizer_config.json, as torchtitan's `model.hf_assets_path` wants.
    """
    corpus = build("stdlib", stdlib_roots())
    target = cache_root() / f"tokenizer-v{VERSION}-{corpus.sha256[:16]}-{VOCAB_SIZE}"
    _make_once(target, lambda folder: _write_tokenizer(folder, corpus))
    return target


def file_sha256(path: Path | str) -> str:
    """SHA-256 of a file's content, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _python_files(name: str, roots: list[str]) -> Iterator[Path]:
    excluded = _TEST_FOLDERS | (_STDLIB_EXCLUDES if name == "stdlib" else set())
    for root in roots:
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - excluded)
            for file in sorted(files):
                path = Path(folder, file)
                if file.endswith(".py") and path.is_file():
                    yield path


def _write_corpus(folder: Path, paths: list[str], roots: list[str]) -> None:
    texts: dict[str, str] = {}
    for path in paths:
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # another user's, or no text
        if text.strip():
            texts[_digest(text)] = text
    if len(texts) < 2:
        raise ConfigError(
            f"{len(texts)} UTF-8 Python files under {', '.join(roots)}: training and validation "
            "need one each; give another folder"
        )
    order = sorted(texts)
    # The first hex digits of a SHA-256 are uniform: they split, and the sort shuffles.
    held_out = [digest for digest in order if int(digest[-8:], 16) < VALIDATION_SHARE * 16**8]
    held_out = (held_out or order[:1])[: len(order) - 1]
    chosen = {"validation": held_out, "train": [d for d in order if d not in set(held_out)]}
    found = {
        split: {_digest(piece): piece for d in chosen[split] for piece in pieces(texts[d])}
        for split in SPLITS
    }
    # No piece that is held out is one of training, unless all are.
    unseen = {d: p for d, p in found["validation"].items() if d not in found["train"]}
    found["validation"] = unseen or found["validation"]
    found = {split: dict(sorted(found[split].items())) for split in SPLITS}
    for split in SPLITS:
        rows = {"text": list(found[split].values())}
        Dataset.from_dict(rows).save_to_disk(str(folder / split))
    order = [digest for split in SPLITS for digest in found[split]]
    record = {
        "sha256": hashlib.sha256("".join(order).encode()).hexdigest(),
        "files": {split: len(chosen[split]) for split in SPLITS},
        "pieces": {split: len(found[split]) for split in SPLITS},
        "bytes": {s: sum(len(piece.encode()) for piece in found[s].values()) for s in SPLITS},
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=2))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def pieces(text: str) -> Iterator[str]:
    """Cut a text at line ends into pieces of at most `PIECE` characters; longer lines are cut."""
    start = 0
    while len(text) - start > PIECE:
        cut = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield text[start:cut]
        start = cut
    if text[start:].strip():
        yield text[start:]


def _write_tokenizer(folder: Path, corpus: Corpus) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.load("train")["text"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _make_once(target: Path, write) -> None:
    """Have one process of all make a folder; it appears complete or not at all.

    A folder whose files are not those of its manifest is made again.
    """
    if _intact(target):
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if _intact(target):
                return
            _logger.info("Making %s (once)", target)
            scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
            try:
                write(scratch)
                (scratch / MANIFEST).write_text(json.dumps(_contents(scratch)))
                shutil.rmtree(target, ignore_errors=True)
                scratch.rename(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"cache folder {target.parent} cannot be written ({error.strerror}): set "
            "XDG_CACHE_HOME to a folder that can"
        ) from error


def _contents(folder: Path) -> dict[str, str]:
    """Every file with its hash, or, where it is large, its size."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            small = path.stat().st_size < _HASHED_BYTES
            found[str(path.relative_to(folder))] = (
                file_sha256(path) if small else str(path.stat().st_size)
            )
    return found


def _intact(folder: Path) -> bool:
    try:
        return json.loads((folder / MANIFEST).read_text()) == _contents(folder)
    except (OSError, ValueError):
        return False
