"""Which commit results say that they come from."""

import subprocess

from nvfp4_titan import version


def test_commit_of_the_source_tree(tmp_path, monkeypatch):
    module = tmp_path / "nvfp4_titan" / "version.py"
    module.parent.mkdir()
    module.write_text("")
    monkeypatch.setattr(version, "__file__", str(module))
    assert version.source_commit() is None  # installed without its repository

    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    git("tag", "v1")  # is no commit's name
    head = git("rev-parse", "HEAD")
    (tmp_path / "untracked").touch()
    assert version.source_commit() == head
    module.write_text("changed")
    assert version.source_commit() == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert version.source_commit() is None
