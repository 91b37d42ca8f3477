"""Issues each warning only once."""

import functools
import warnings


@functools.cache
def warn_once(message: str) -> None:
    """Issues a warning unless the same message was issued before; ``warn_once.cache_clear()`` resets this."""
    warnings.warn(message, stacklevel=2)
