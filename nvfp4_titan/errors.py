"""Errors that are the user's to fix: a bad setting, or a machine that lacks something.

The launcher prints these as one line and exits with status 2; anything else keeps its traceback.
"""

from numbers import Integral, Real


class UserError(Exception):
    """Base of all errors whose message names what the user can change."""


class ConfigError(UserError, ValueError):
    """A setting, rule, shape or file that cannot be used as given."""


class OutOfTime(UserError):
    """The time limit ended before all jobs did; the same command goes on."""


class DivergedError(UserError, RuntimeError):
    """Training cannot go on: the loss is NaN or infinite."""


class UnsupportedError(UserError, RuntimeError):
    """This machine, or this combination of features, cannot do what was asked."""


_KINDS = {bool: "true or false", Integral: "an integer", Real: "a number"}


def check_types(kind: type, **given: object) -> None:
    """Check arguments, by name: "no" would count as true.

    Args:
        kind: bool, numbers.Integral or numbers.Real.
        given: The arguments.

    Raises:
        ConfigError: one is of another type; a bool is no number.
    """
    for name, value in given.items():
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{name}={value!r} must be {_KINDS[kind]}")
