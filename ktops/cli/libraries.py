"""What other libraries print: warnings in one style, without those that users cannot act on."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

FOR_DEVELOPERS = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
"""Warnings about how code calls a library."""


@contextmanager
def warnings_in_one_style() -> Iterator[None]:
    """Shows warnings on stderr as one line each, without the place in the code.

    Python's own options (``-W``, PYTHONWARNINGS) still choose which.
    """
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for category in FOR_DEVELOPERS:
                warnings.simplefilter("ignore", category)
        warnings.showwarning = _show
        yield


def _show(message, category, filename, lineno, file=None, line=None) -> None:
    text = " ".join(str(message).split()).removeprefix("ktops: ")
    print(f"ktops: warning: {text}", file=file or sys.stderr)


def silence_transformers() -> None:
    """Turns off the log and the progress bars of transformers; its errors are still raised and logged."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()
    disable_progress_bar()
