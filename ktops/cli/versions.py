"""Finds installed versions without importing the packages."""

import platform
from importlib import metadata

import ktops

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


def versions() -> dict[str, str | None]:
    """Returns the versions of ktops, Python and the packages that affect results; None if not installed."""
    found: dict[str, str | None] = {"ktops": ktops.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
