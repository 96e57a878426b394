"""Corpora and tokenizer: split, order, determinism, concurrency, errors."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4_titan.errors import ConfigError
from nvfp4_titan.titan import corpus
from nvfp4_titan.titan.datasets import dataset_corpus


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """60 files, of them one copy, one test, one that is not UTF-8."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "src"
    (folder / "pkg" / "tests").mkdir(parents=True)
    for i in range(57):
        (folder / "pkg" / f"m{i}.py").write_text(f"x = {i}\n")
    (folder / "pkg" / "copy.py").write_text("x = 3\n")
    (folder / "pkg" / "tests" / "test_x.py").write_text("assert True\n")
    (folder / "pkg" / "latin.py").write_bytes(b"# \xe9\n")
    (folder / "pkg" / "data.txt").write_text("no source")
    return folder


def test_split_order_and_duplicates(sources):
    made = corpus.build("folder", [str(sources)])
    texts = {split: made.load(split)["text"] for split in corpus.SPLITS}
    assert made.files == made.pieces == {split: len(texts[split]) for split in corpus.SPLITS}
    assert sum(made.files.values()) == 57 and made.files["validation"] >= 1
    assert set(texts["train"]).isdisjoint(texts["validation"])
    for split in corpus.SPLITS:
        digests = [hashlib.sha256(t.encode()).hexdigest() for t in texts[split]]
        assert digests == sorted(digests)


def test_long_files_are_read_in_pieces(sources):
    """Cut at line ends, of which none is lost, with neighbours from different files."""
    long = {name: f"{name} = 1\n" * 4000 + "z" * 20000 for name in ("first", "other")}
    for name, text in long.items():
        assert "".join(corpus.pieces(text)) == text
        assert max(map(len, corpus.pieces(text))) <= corpus.PIECE
        (sources / f"{name}.py").write_text("".join(f"{name}{i} = {i}\n" for i in range(4000)))
    made = corpus.build("folder", [str(sources)])
    texts = made.load("train")["text"]
    assert made.pieces["train"] == len(texts) > made.files["train"]
    whole = [t for t in texts if len(t) > corpus.PIECE / 2]
    assert len(whole) > 10 and all(t.startswith(("first", "other")) for t in whole)
    names = [t[:5] for t in whole]
    assert names != sorted(names) and names != sorted(names, reverse=True)


def test_no_held_out_piece_is_one_of_training(sources):
    """Files that differ in a line share their other pieces."""
    shared = "".join(f"shared{i} = {i}\n" for i in range(3000))
    for i in range(60):
        (sources / f"long{i}.py").write_text(shared + f"own = {i}\n")
    made = corpus.build("folder", [str(sources)])
    texts = {split: made.load(split)["text"] for split in corpus.SPLITS}
    assert any(t.startswith("shared0 ") for t in texts["train"])
    assert set(texts["train"]).isdisjoint(texts["validation"])
    assert any("own = " in t for t in texts["validation"])


def test_hash_depends_on_content_alone(sources, tmp_path):
    first = corpus.build("folder", [str(sources)])
    assert corpus.build("folder", [str(sources)]) == first
    moved = tmp_path / "elsewhere"
    sources.rename(moved)
    second = corpus.build("folder", [str(moved)])
    assert second.sha256 == first.sha256 and second.path != first.path
    (moved / "pkg" / "new.py").write_text("y = 1\n")
    assert corpus.build("folder", [str(moved)]).sha256 != first.sha256


def test_several_processes_make_it_once(sources):
    program = (
        "import sys; from nvfp4_titan.titan import corpus;"
        "print(corpus.build('folder', [sys.argv[1]]).path)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(sources)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    paths = {process.communicate()[0].strip() for process in started}
    assert all(process.returncode == 0 for process in started) and len(paths) == 1
    left = [p.name for p in corpus.cache_root().iterdir() if not p.name.endswith(".lock")]
    assert len(left) == 1


def test_an_interrupted_build_leaves_nothing(sources, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(corpus, "_write_corpus", fail)
        with pytest.raises(KeyboardInterrupt):
            corpus.build("folder", [str(sources)])
    assert [p.name for p in corpus.cache_root().iterdir() if p.is_dir()] == []
    assert corpus.build("folder", [str(sources)]).files["train"] > 0


@pytest.mark.parametrize("damage", ["corpus.json", "manifest.json", "train"])
def test_a_damaged_corpus_is_made_again(sources, damage):
    made = corpus.build("folder", [str(sources)])
    target = made.path / damage
    if target.is_dir():
        arrow = next(target.glob("*.arrow"))
        arrow.write_bytes(arrow.read_bytes()[:64])
    else:
        target.write_text("")
    assert corpus.build("folder", [str(sources)]) == made
    assert len(made.load("train")) == made.files["train"]


def test_same_names_and_sizes_elsewhere_are_another_corpus(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(sources)
    first = corpus.build("folder", ["pkg"])
    other = tmp_path / "other"
    (other / "pkg").mkdir(parents=True)
    for i in range(57):
        (other / "pkg" / f"m{i}.py").write_text(f"y = {i}\n")
    monkeypatch.chdir(other)
    assert corpus.build("folder", ["pkg"]).sha256 != first.sha256


def test_two_files_are_enough_and_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "few"
    folder.mkdir()
    (folder / "a.py").write_text("a = 1\n")
    with pytest.raises(ConfigError, match="one each"):
        corpus.build("folder", [str(folder)])
    (folder / "b.py").write_text("b = 1\n")
    assert corpus.build("folder", [str(folder)]).files == {"train": 1, "validation": 1}


def test_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="is not there"):
        corpus.build("folder", [str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        corpus.build("stdlib", corpus.stdlib_roots())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(f"{name} = 1\n")
    (tmp_path / "others.py").write_text("not ours")
    read = Path.read_bytes

    def read_own(path):
        if path.name == "others.py":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_own)
    assert len(corpus.build("folder", [str(tmp_path)]).load("train")) == 1
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="0 UTF-8 Python files"):
        corpus.build("folder", [str(tmp_path / "empty")])


def test_stdlib_and_tokenizer():
    made = dataset_corpus("stdlib", None)
    assert made == dataset_corpus("stdlib_validation", None)
    assert made.bytes["train"] > 5_000_000 and 10 < made.files["validation"] < 100
    assert dataset_corpus("c4", None) is None
    folder = corpus.tokenizer_path()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == corpus.VOCAB_SIZE
    text = "def f(x):\n    return x + 1  # caf\u00e9\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == corpus.EOS


def test_pysource_holds_more_than_the_stdlib():
    roots = corpus.pysource_roots()
    assert corpus.stdlib_roots()[0] in roots and len(roots) > 1


def test_a_process_looks_at_its_files_once(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "b.py").write_text("b = 1\n")
    first = dataset_corpus("stdlib", str(tmp_path))
    (tmp_path / "c.py").write_text("c = 1\n")
    monkeypatch.chdir(tmp_path.parent)
    assert dataset_corpus("stdlib_validation", tmp_path.name) == first
