"""Programs of this folder that test parts of ktops_csrc by themselves."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def compiled(name: str, folder: Path, *sources: str) -> Path:
    """``<name>.cpp``, compiled into ``folder`` with these files of ktops_csrc."""
    csrc, output = ROOT / "ktops_csrc", folder / name
    files = [ROOT / "test" / f"{name}.cpp", *(csrc / source for source in sources)]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{csrc}"]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, *files, "-o", output], check=True)
    return output
