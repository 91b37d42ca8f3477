"""Runs programs that use AMX tiles on any x86-64 CPU: a preloaded library executes the tile instructions.

The library is built with g++ on first use, in a temporary folder; ``emulator.cpp`` explains how it works. It
executes LDTILECFG, STTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILELOADDT1, TILESTORED, TDPBF16PS, TDPBSSD,
TDPBSUD, TDPBUSD and TDPBUUD bit for bit as the hardware does, and counts them. Where the hardware would
fault, it prints the reason to stderr.

Example:
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     subprocess.run(["./program"], env=environment(counts=folder), check=True)
    ...     print(read_counts(folder)["tdpbf16ps"])
"""

import atexit
import ctypes
import functools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import ktops
from ktops.testing.compiler import compile_cpp

INSTRUCTIONS = (
    "ldtilecfg", "sttilecfg", "tilerelease", "tilezero", "tileloadd", "tileloaddt1", "tilestored",
    "tdpbf16ps", "tdpbssd", "tdpbsud", "tdpbusd", "tdpbuud",
)  # fmt: skip
"""The instructions that the emulator executes and counts."""

DOT_PRODUCTS = ("tdpbf16ps", "tdpbssd", "tdpbsud", "tdpbusd", "tdpbuud")
LOADS = ("tileloadd", "tileloaddt1")


@functools.cache
def library() -> Path:
    """Returns the emulator's shared library, built on the first call and deleted when this process ends."""
    folder = tempfile.mkdtemp(prefix="ktops-amx-emulator-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = Path(__file__).parent / "emulator.cpp"
    flags = ("-fPIC", "-shared", "-fvisibility=hidden")
    return compile_cpp([source], Path(folder) / "libamx_emulator.so", *flags)


def environment(*, counts: str | os.PathLike | None = None, refuse: int | None = None) -> dict[str, str]:
    """Returns this process's environment with what a process under the emulator needs.

    Args:
        counts: an existing folder to which every process writes its counts when it exits
            (:func:`read_counts`).
        refuse: the errno with which requests for permission to use tiles fail; None grants permission.
    """
    env = os.environ | {"LD_PRELOAD": " ".join([*os.environ.get("LD_PRELOAD", "").split(), str(library())])}
    for name in ("KTOPS_AMX_EMULATOR_COUNTS", "KTOPS_AMX_EMULATOR_REFUSE"):
        env.pop(name, None)
    if counts is not None:
        env["KTOPS_AMX_EMULATOR_COUNTS"] = os.path.join(counts, "%p.json")
    if refuse is not None:
        env["KTOPS_AMX_EMULATOR_REFUSE"] = str(refuse)
    return env


def row_environment(
    *, counts: str | os.PathLike | None = None, path: Sequence[str | os.PathLike] = ()
) -> dict[str, str]:
    """Returns the environment for a process that uses the ``amx_bf16`` kernels of ktops under the emulator.

    ``path`` is prepended to PYTHONPATH. PyTorch's own matrix products are kept from using tiles
    (ONEDNN_MAX_CPU_ISA), so that all tile instructions are those of ktops.

    Raises:
        RuntimeError: this CPU lacks AVX512_BF16, which the kernels also use and which is not emulated.
    """
    if not ktops.cpu_capabilities()["avx512_bf16"]:
        raise RuntimeError(
            "the amx_bf16 kernels cannot run here: they also use AVX-512 with BF16, which this CPU lacks and "
            "the emulator does not execute"
        )
    env = environment(counts=counts)
    if path:
        env["PYTHONPATH"] = os.pathsep.join([*map(str, path), *filter(None, [env.get("PYTHONPATH")])])
    return env | {
        "KTOPS_ISA": "amx_bf16",
        "KTOPS_ISA_UNCHECKED": "1",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    }


def read_counts(folder: str | os.PathLike) -> Counter:
    """Returns the instructions executed by all processes that have written to ``folder``, by name."""
    total: Counter = Counter()
    for file in Path(folder).glob("*.json"):
        total.update(json.loads(file.read_text()))
    return total


def counts() -> Counter:
    """Returns the instructions executed by this process so far, by name.

    Raises:
        RuntimeError: this process does not run under the emulator.

    Example:
        >>> before = counts()
        ... # compute
        ... print((counts() - before)["tdpbf16ps"])
    """
    try:
        count = ctypes.CDLL(None).amx_emulator_count
    except AttributeError as error:
        raise RuntimeError("this process does not run under the AMX emulator") from error
    count.restype = ctypes.c_int64
    return Counter({name: count(name.encode()) for name in INSTRUCTIONS})
