"""Errors of this package."""


class AdapterError(ValueError):
    """An adapter cannot be read, merged or written as requested; the message names the key and the file."""
