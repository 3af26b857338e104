"""The errors a user can cause, each with the exit code of the command line.

A message is one line: what is wrong, where, and how to mend it. `rlboard.cli.main` prints it and exits with the
code; a traceback is only for our own mistakes.
"""

import warnings


def plain_warnings() -> None:
    """Makes of a warning one line that says who speaks, without the place in the source."""
    warnings.formatwarning = lambda message, *_, **__: f"rlboard: {message}\n"


class RlboardError(Exception):
    """Something the user can mend. Raise one of the classes below."""

    exit_code = 1


class UsageError(RlboardError):
    """An option, environment or name that cannot be used."""

    exit_code = 2


class DataError(RlboardError):
    """Data that is missing, damaged or of the wrong shape."""

    exit_code = 3


class NumericalError(RlboardError):
    """A loss, gradient or reward that is NaN or infinite: the run cannot go on."""

    exit_code = 4


class StorageError(RlboardError):
    """A log directory that cannot be made or written."""

    exit_code = 5


class OutOfMemoryError(RlboardError):
    """The device or the machine has too little memory."""

    exit_code = 6
