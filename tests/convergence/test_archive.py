"""Archives of finished runs: what is taken out of them, and what is refused."""

import tarfile

import pytest

from nvfp4_titan.convergence import archive as archives
from nvfp4_titan.convergence.archive import carried, pack, unpack
from nvfp4_titan.convergence.launch import REQUEST
from nvfp4_titan.errors import ConfigError


def finished(folder):
    folder.mkdir(parents=True)
    (folder / REQUEST).write_text('{"finished": true}')
    return folder


def test_a_run_travels_and_one_that_is_there_stays(tmp_path):
    archive, runs = tmp_path / "runs.tar.gz", tmp_path / "elsewhere"
    assert pack([finished(tmp_path / "a"), finished(tmp_path / "b")], archive) == ["a", "b"]
    kept = finished(runs / "b") / REQUEST
    kept.write_text('{"finished": true, "own": 1}')
    assert unpack(archive, runs) == ["a"]
    assert (runs / "a" / REQUEST).read_text() == '{"finished": true}' and "own" in kept.read_text()


def test_a_run_takes_the_place_of_an_unfinished_one(tmp_path):
    archive, runs = tmp_path / "runs.tar.gz", tmp_path / "elsewhere"
    pack([finished(tmp_path / "a")], archive)
    events = runs / "a" / "tb" / "1" / "events.out.tfevents.9.x.1.0"
    events.parent.mkdir(parents=True)
    events.write_text("of another run")
    (runs / "a" / REQUEST).write_text("{}")
    assert unpack(archive, runs) == ["a"] and not events.exists()


def test_an_archive_never_loses_runs_that_are_nowhere_else(tmp_path):
    archive, runs = tmp_path / "runs.tar.gz", tmp_path / "elsewhere"
    pack([finished(tmp_path / "a"), finished(tmp_path / "b")], archive)
    finished(runs / "b")
    before = archive.read_bytes()
    with pytest.raises(ConfigError, match=r"would lose them: a\. Add --take .*runs\.tar\.gz"):
        with carried(runs, (), archive):
            raise AssertionError("before any work")
    assert archive.read_bytes() == before
    with carried(runs, (archive,), archive):
        finished(runs / "c")
    assert archives.names(archive) == {"a", "b", "c"}
    with carried(runs, (), archive):  # all of it is here
        pass


def test_a_run_that_could_not_be_taken_whole_has_not_finished(tmp_path, monkeypatch):
    archive, runs = tmp_path / "runs.tar.gz", tmp_path / "elsewhere"
    events = finished(tmp_path / "a") / "tb" / "1" / "events.out.tfevents.9.x.1.0"
    events.parent.mkdir(parents=True)
    events.write_text("losses")
    pack([tmp_path / "a"], archive)

    def disk_full(tar, member, folder):
        if "tfevents" in member.name:
            raise OSError("no space left")
        write(tar, member, folder)

    write = archives._write
    monkeypatch.setattr(archives, "_write", disk_full)
    with pytest.raises(ConfigError, match="no space left"):
        unpack(archive, runs)
    monkeypatch.undo()
    assert unpack(archive, runs) == ["a"] and next(runs.glob("a/tb/1/*")).read_text() == "losses"


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b[:40] + b"xx" + b[42:]])
def test_a_damaged_archive_gives_nothing(tmp_path, damage):
    archive, runs = tmp_path / "runs.tar.gz", tmp_path / "elsewhere"
    pack([finished(tmp_path / name) for name in "abc"], archive)
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(ConfigError, match="archive of runs"):
        unpack(archive, runs)
    assert not runs.exists()


def test_an_archive_made_by_hand(tmp_path):
    """Of folders, and with names that begin with "./"."""
    archive, runs = tmp_path / "runs.tar.gz", tmp_path / "elsewhere"
    finished(runs / "kept")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(finished(tmp_path / "a"), "./a")
    assert unpack(archive, runs) == ["a"] and (runs / "a" / REQUEST).is_file()
    assert (runs / "kept" / REQUEST).is_file()


@pytest.mark.parametrize("content", ['{"fini', "[]", "null"])
def test_a_damaged_request_is_no_finished_run(tmp_path, content):
    (finished(tmp_path / "torn") / REQUEST).write_text(content)
    assert pack([tmp_path / "torn", finished(tmp_path / "a")], tmp_path / "x.tar.gz") == ["a"]


def test_a_folder_that_is_a_link_is_not_written_through(tmp_path):
    pack([finished(tmp_path / "a")], tmp_path / "x.tar.gz")
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a").symlink_to(tmp_path / "disk")
    with pytest.raises(ConfigError, match="is a link"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "runs")
    assert not list((tmp_path / "disk").iterdir())


@pytest.mark.parametrize("name", ["../outside/x", "/tmp/../outside/x", "/x/y", "./..", "loose"])
def test_nothing_is_written_outside(tmp_path, name):
    archive, runs = tmp_path / "runs.tar.gz", tmp_path / "runs"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ConfigError, match="no file of a run"):
        unpack(archive, runs)
    assert not (tmp_path / "outside").exists()


def test_what_is_no_archive(tmp_path):
    (tmp_path / "x").write_text("no archive")
    with pytest.raises(ConfigError, match="archive of runs"):
        unpack(tmp_path / "x", tmp_path / "runs")
