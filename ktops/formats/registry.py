"""The formats by name."""

from ktops.formats.format import Format

_formats: dict[str, Format] = {}


def register(format: Format) -> None:
    """Makes a format known by its name."""
    _formats[format.name] = format


def names() -> tuple[str, ...]:
    """The names of all formats."""
    return tuple(_formats)


def get_format(name: str) -> Format:
    """The format of this name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in _formats:
        raise ValueError(f"format must be one of {', '.join(_formats)}, got {name!r}")
    return _formats[name]
