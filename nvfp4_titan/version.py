"""Which code this is: the package's version and commit, readable without importing torch."""

import subprocess
from pathlib import Path

__version__ = "0.1.0"


def source_commit() -> str | None:
    """Git commit of this source tree, with "-dirty" where tracked files differ from it.

    None where the package is installed without its repository, or git is missing.
    """
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None
