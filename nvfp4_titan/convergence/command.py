"""What commands that start jobs share: options for every job, stopping, exit statuses."""

import signal
import sys
from collections.abc import Callable

from ..errors import UserError
from .launch import OutOfTime

USAGE, OUT_OF_TIME, INTERRUPTED = 2, 3, 130


def split_options(argv: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """A command's own options, and those after "--", which go to every job."""
    split = argv.index("--") if "--" in argv else len(argv)
    return argv[:split], tuple(argv[split + 1 :])


def exit_status(work: Callable[[], int]) -> int:
    """Do a command's work, which SIGTERM ends as Ctrl-C does.

    Returns:
        What the work returns; USAGE, OUT_OF_TIME or INTERRUPTED, with a line on stderr, where it
        did not end.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work()
    except OutOfTime as stop:
        print(f"{stop}", file=sys.stderr)
        return OUT_OF_TIME
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("interrupted: call it again to go on", file=sys.stderr)
        return INTERRUPTED
