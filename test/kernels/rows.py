"""The ISAs in the sources: what the kernels of each include, and programs compiled for one."""

import os
import re
import subprocess
from pathlib import Path

CSRC = Path(__file__).parents[2] / "ktops_csrc"

ROWS = re.findall(r"^KT_ROW\((\w+)\)$", (CSRC / "isa" / "rows.def").read_text(), re.MULTILINE)[::-1]
"""Simplest first."""

SHARED = ["avx512_vbmi"]
"""Compiled like an ISA, for several of them."""

FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-I{CSRC}")


def includes(name: str) -> list[str]:
    """Returns the files of ktops_csrc that a file of ktops_csrc includes."""
    return re.findall(r'#include "([^"]+)"', (CSRC / name).read_text())


def reached(name: str) -> set[str]:
    """Returns the files that a file includes, directly or indirectly."""
    found, left = set(), [name]
    while left:
        for other in includes(left.pop()):
            if other not in found:
                found.add(other)
                left.append(other)
    return found


def compile_cpp(*arguments: str | Path, text: str | None = None) -> str:
    """Runs CXX (g++) with the flags of all ISAs; returns its output."""
    command = [os.environ.get("CXX", "g++"), *FLAGS, *map(str, arguments)]
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[:5000]}"
    return result.stdout
