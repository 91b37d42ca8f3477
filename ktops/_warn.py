"""Warnings that are issued once."""

import functools
import warnings


@functools.cache
def warn_once(message: str) -> None:
    """Warns unless this message was already issued; ``warn_once.cache_clear()`` forgets all messages."""
    warnings.warn(message, stacklevel=2)
