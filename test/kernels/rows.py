"""The rows of kernels in the sources: what each includes, and programs that are compiled for one."""

import os
import re
import subprocess
from pathlib import Path

CSRC = Path(__file__).parents[2] / "ktops_csrc"

ROWS = re.findall(r"^KT_ROW\((\w+)\)$", (CSRC / "isa" / "rows.def").read_text(), re.MULTILINE)[::-1]
"""Simplest first."""

FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-I{CSRC}")


def includes(name: str) -> list[str]:
    """What a file of ktops_csrc includes of ktops_csrc."""
    return re.findall(r'#include "([^"]+)"', (CSRC / name).read_text())


def reached(name: str) -> set[str]:
    """The same, and what these include in turn."""
    found, left = set(), [name]
    while left:
        for other in includes(left.pop()):
            if other not in found:
                found.add(other)
                left.append(other)
    return found


def compile_cpp(*arguments: str | Path, text: str | None = None) -> str:
    """Runs CXX (g++) with the flags of all rows; returns what it prints."""
    command = [os.environ.get("CXX", "g++"), *FLAGS, *map(str, arguments)]
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[:5000]}"
    return result.stdout
