"""The results that the docs quote follow from the event files kept beside them."""

import json
import re
import shlex
from pathlib import Path

import pytest
from fake_jobs import script

ROOT = Path(__file__).parents[2]
RESULTS, DOC = ROOT / "docs" / "results", ROOT / "docs" / "convergence.md"


def archives_of(argv: list[str]) -> list[str]:
    """Archives of the runs of a command's TOML."""
    return sorted(map(str, RESULTS.glob(f"convergence_{Path(argv[0]).stem}_runs*.tar.gz")))


def quoted_commands() -> dict[Path, list[str]]:
    """Arguments of the doc's commands whose runs are kept, by what they write (no suffix)."""
    quoted = {}
    for block in re.findall(r"```bash\n(.*?)```", DOC.read_text(), re.DOTALL):
        words = shlex.split(block.replace("\\\n", " "))
        if "scripts/check_convergence.py" not in words:
            continue
        argv = words[words.index("scripts/check_convergence.py") + 1 :]
        output = ROOT / argv[argv.index("--output") + 1]
        if output.parent == RESULTS and archives_of(argv):
            quoted[output] = argv
    return quoted


@pytest.mark.parametrize(
    "quoted, argv", [pytest.param(*item, id=item[0].name) for item in quoted_commands().items()]
)
def test_judged_again(quoted, argv, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    output = ["--output", f"{tmp_path}/again"]  # the last one counts
    reading = ["--no-launch", "--take", *archives_of(argv), "--runs", f"{tmp_path}/runs"]
    own = argv.index("--")
    status = script("check_convergence").main([*argv[:own], *output, *reading, *argv[own:]])
    report = quoted.with_suffix(".md").read_text()
    assert (tmp_path / "again.md").read_text() == report
    assert status == (0 if ": PASS" in report else 1)
    rows = [json.loads(p.with_suffix(".json").read_text()) for p in (quoted, tmp_path / "again")]
    assert rows[0] == rows[1]


def test_every_archive_is_judged():
    judged = {path for argv in quoted_commands().values() for path in archives_of(argv)}
    assert judged == set(map(str, RESULTS.glob("*_runs*.tar.gz"))) != set()
