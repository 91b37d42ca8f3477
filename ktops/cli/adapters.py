"""What `ktops export` and `ktops merge` share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ktops.cli.errors import Interrupted, UserError


@contextmanager
def told(destination: Path) -> Iterator[None]:
    """Turns errors into messages."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{error.filename or destination}: {error.strerror}. Nothing was written") from None
    except KeyboardInterrupt:
        raise Interrupted("Interrupted. Nothing was written.") from None


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
