"""The results that the docs quote follow from the event files kept beside them."""

import json
import re
import shlex
from pathlib import Path

import pytest
from fake_jobs import script

ROOT = Path(__file__).parents[2]
RESULTS, DOC = ROOT / "docs" / "results", ROOT / "docs" / "convergence.md"
ARCHIVES = sorted(RESULTS.glob("convergence_*_runs.tar.gz"))


def quoted_command(output: Path) -> list[str]:
    """Arguments of the doc's command that writes these results."""
    blocks = re.findall(r"```bash\n(.*?)```", DOC.read_text(), re.DOTALL)
    name = str(output.relative_to(ROOT))
    (words,) = (w for block in blocks if name in (w := shlex.split(block.replace("\\\n", " "))))
    return words[words.index("scripts/check_convergence.py") + 1 :]


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name)
def test_judged_again(archive, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    quoted = RESULTS / archive.name.removesuffix("_runs.tar.gz")
    argv = quoted_command(quoted)
    argv[argv.index("--output") + 1] = f"{tmp_path}/again"
    archives = map(str, sorted(RESULTS.glob(f"{quoted.name}_runs*.tar.gz")))
    reading = ["--no-launch", "--take", *archives, "--runs", f"{tmp_path}/runs"]
    own = argv.index("--")
    status = script("check_convergence").main([*argv[:own], *reading, *argv[own:]])
    report = quoted.with_suffix(".md").read_text()
    assert (tmp_path / "again.md").read_text() == report
    assert status == (0 if ": PASS" in report else 1)
    rows = [json.loads(p.with_suffix(".json").read_text()) for p in (quoted, tmp_path / "again")]
    assert rows[0] == rows[1]


def test_there_is_evidence():
    assert ARCHIVES
