"""What `ktops export` and `ktops merge` share."""

from contextlib import AbstractContextManager
from pathlib import Path

from ktops.cli.errors import UserError, told


def nothing_written(destination: Path) -> AbstractContextManager[None]:
    """Turns errors into messages; the destination then does not exist."""
    return told(
        destination,
        (ValueError, ImportError),
        failed=". Nothing was written",
        interrupted="Nothing was written.",
    )


def parse_weights(text: str | None) -> list[float] | None:
    """Parses ``--weights``: numbers separated by commas.

    Raises:
        UserError: a part is not a number.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--weights: expected numbers separated by commas, such as 0.5,0.5, got {text!r}"
        ) from None
