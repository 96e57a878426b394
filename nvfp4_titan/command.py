"""What commands share: options for every job, files of results, errors as one line, stopping."""

import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path

from .errors import ConfigError, OutOfTime, UserError

USAGE, OUT_OF_TIME, INTERRUPTED = 2, 3, 130


def split_options(argv: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """A command's own options, and those after "--", which go to every job."""
    split = argv.index("--") if "--" in argv else len(argv)
    return argv[:split], tuple(argv[split + 1 :])


def runs_folder(given: Path | None, command: str, config: Path) -> Path:
    """Folder of the runs of a command: as given, or one for each of its TOMLs."""
    return given or Path("outputs", command, config.stem)


def result_file(output: Path, suffix: str) -> Path:
    """OUTPUT and a suffix, whatever dots a model's name has.

    Raises:
        ConfigError: it cannot be written; so it can be asked for before the work.
    """
    path = output.with_name(output.name + suffix)
    check_writable(path)
    return path


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table; "|" in a cell stays in it."""
    return [markdown_row(head), "|" + "---|" * len(head), *map(markdown_row, rows)]


def markdown_row(cells: Iterable[object]) -> str:
    """A line of `markdown_table`."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def check_writable(path: Path) -> None:
    """Check that a file can be written; what is in it stays.

    Raises:
        ConfigError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if not path.stat().st_size:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): give another") from error


def reporting(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate what returns a command's exit status.

    What the user can mend becomes a line on stderr, and the status USAGE or OUT_OF_TIME.
    """

    @wraps(main)
    def reported(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except OutOfTime as stop:
            print(f"{stop}", file=sys.stderr)
            return OUT_OF_TIME
        except UserError as error:
            # At once: a rank may be ended before its streams are flushed.
            print(f"error: {error}", file=sys.stderr, flush=True)
            return USAGE

    return reported


def exit_status(
    work: Callable[[], int], interrupted: str = "interrupted: call it again to go on"
) -> int:
    """Do the work of a command that is stopped in good order; SIGTERM ends it as Ctrl-C does.

    Args:
        work: The work.
        interrupted: What is said then.

    Returns:
        What the work returns; USAGE, OUT_OF_TIME or INTERRUPTED, with a line on stderr, where it
        did not end.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return reporting(work)()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
