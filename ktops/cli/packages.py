"""Checks for the optional packages that commands need."""

import importlib.util

from ktops.cli.errors import UserError


def require_packages(*names: str) -> None:
    """Raises UserError with install instructions if any of the packages is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"this command needs packages that are not installed: {', '.join(missing)}. Install them with\n"
            "  pip install 'ktops[cli]'"
        )
