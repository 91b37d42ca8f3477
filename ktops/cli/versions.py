"""Which versions are installed, without importing the packages."""

import platform
from importlib import metadata

import ktops

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


def versions() -> dict[str, str | None]:
    """Version of ktops, of Python and of the packages that decide the result; None for one that is not
    installed."""
    found: dict[str, str | None] = {"ktops": ktops.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
