"""Builds the C++ of this package with the machine's compiler."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def compile_cpp(sources: Sequence[Path], output: Path, *flags: str) -> Path:
    """Builds a program or library with CXX (g++) for this machine's CPU.

    Raises:
        RuntimeError: the compiler is missing or fails; the message includes its output.

    Example:
        >>> compile_cpp([folder / "emulator.cpp"], folder / "libemulator.so", "-fPIC", "-shared")
    """
    name = os.environ.get("CXX", "g++")
    compiler = shutil.which(name)
    if compiler is None:
        raise RuntimeError(f"building {output.name} needs {name!r}, not found")
    command = [compiler, "-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-Wall", "-Wextra"]
    command += [*flags, *map(str, sources), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{output.name} could not be built: {' '.join(command)}\n{result.stderr}")
    return output
