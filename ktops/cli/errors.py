"""Exceptions that stop a command with a message instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """An error that the user can fix; the message says how. The command prints it and exits with status 1."""


class Interrupted(Exception):
    """Ctrl-C stopped the command; the message says how to continue if anything was saved. Exit status 130."""


@contextmanager
def told(
    path: Path, errors: tuple[type[Exception], ...], *, failed: str = "", interrupted: str
) -> Iterator[None]:
    """Turns what stops a command into its messages.

    Args:
        path: what the command writes, for errors of the system that name no file.
        errors: those whose own messages are for the user.
        failed: what follows an error of the system.
        interrupted: what follows Ctrl-C.

    Raises:
        UserError, Interrupted
    """
    try:
        yield
    except errors as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}{failed}") from None
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted. {interrupted}") from None
