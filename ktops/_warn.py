"""Warnings that are given once."""

import functools
import warnings


@functools.cache
def warn_once(message: str) -> None:
    """Warns, unless this message was given before; ``warn_once.cache_clear()`` forgets."""
    warnings.warn(message, stacklevel=2)
