"""The formats by name."""

from ktops.formats.format import Format

_formats: dict[str, Format] = {}


def register(format: Format) -> None:
    """Registers a format under its name."""
    _formats[format.name] = format


def names(*, written: bool = False) -> tuple[str, ...]:
    """Returns the names of all formats, or of those that weights can be quantized to."""
    return tuple(name for name, format in _formats.items() if format.written or not written)


def get_format(name: str) -> Format:
    """Returns the format with this name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in _formats:
        only_read = ", ".join(sorted({*names()} - {*names(written=True)}))
        raise ValueError(
            f"format must be one of {', '.join(names(written=True))}, or, for reading only, {only_read}, "
            f"got {name!r}"
        )
    return _formats[name]
