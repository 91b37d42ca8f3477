"""Programs in this folder that test parts of ktops_csrc in isolation."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def compiled(name: str, folder: Path, *sources: str, flags: Sequence[str] = ()) -> Path:
    """Compiles ``<name>.cpp`` with these files of ktops_csrc into ``folder``; returns the program."""
    csrc, output = ROOT / "ktops_csrc", folder / name
    files = [ROOT / "test" / f"{name}.cpp", *(csrc / source for source in sources)]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{csrc}", *flags]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, *files, "-o", output], check=True)
    return output
