"""Errors that are the user's to fix: a bad setting, or a machine that lacks something.

The launcher prints these as one line and exits with status 2; anything else keeps its traceback.
"""


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
