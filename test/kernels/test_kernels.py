"""Runs every kernel of kernels.def on its edge cases, for every ISA.

Sums are compared with those in long double, within the bound of their rounding errors; everything else bit
for bit. Inputs end where memory ends, and kernels must write nothing but results.
"""

import functools
import re
import subprocess
from pathlib import Path

import pytest
from edges import EDGES
from rows import CSRC, ROWS, compile_cpp, includes, reached

import ktops
from ktops.testing import amx_emulator

HERE = Path(__file__).parent
LIST = (HERE / "kernels.def").read_text()
LINES = re.findall(r"^KT_(?:(TILE|BAND|AHEAD)_)?KERNEL\((\w+), ([\w:]+)\)$", LIST, re.MULTILINE)


def has_tiles(row: str) -> bool:
    return any("amx" in name for name in reached(f"dispatch/{row}.cpp"))


def has(row: str, need: str) -> bool:
    """Returns True if an ISA has the kernels of KT_<need>_KERNEL, or if that is empty."""
    files = {"BAND": "isa/bands_avx512-inl.h", "AHEAD": "isa/pack_ahead_avx512-inl.h"}
    if need in files:
        return files[need] in reached(f"dispatch/{row}.cpp")
    return not need or has_tiles(row)


def dtypes(row: str, suite: str) -> list[str]:
    """Returns the dtypes that an ISA has kernels for: float64 only in the simplest, widening to float32."""
    widens = "kBFloat16Dot = true" not in (CSRC / "dispatch" / f"{row}.h").read_text()
    absent = {"float64"} if row != "scalar" else set()
    if suite == "micro_gemm" and widens:
        absent.add("bfloat16")
    return [dtype for dtype in EDGES[suite][0] if dtype not in absent]


CASES = {
    row: [
        f"{suite} {dtype} {edge}"
        for need, suite, _ in LINES
        if has(row, need)
        for dtype in dtypes(row, suite)
        for edge in EDGES[suite][1]
    ]
    for row in ROWS
}
CAN_RUN = ktops.cpu_capabilities()
RUNNABLE = [row for row in ROWS if CAN_RUN["avx512_bf16" if has_tiles(row) else row]]


def source(row: str) -> str:
    own = [name for name in includes(f"dispatch/{row}.cpp") if name.startswith("isa/") and "-inl" in name]
    lines = [f'#include "dispatch/{row}.h"', *(f'#include "{name}"' for name in own)]
    macros = {"TILE": "KT_TILES", "BAND": "KT_BANDS", "AHEAD": "KT_AHEAD"}
    defines = [f"#define {macro}" for need, macro in macros.items() if has(row, need)]
    return "\n".join([*lines, *defines, '#include "driver.cpp"', ""])


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@functools.cache
def results(row: str, folder: Path) -> dict[str, str]:
    """Compiles and runs the kernels of an ISA once; returns {case: output of its suite}."""
    # unoptimized, as compiling the same source takes a third of the time
    sources = ["-x", "c++", "-", CSRC / "core" / "workspace.cpp"]
    try:
        compile_cpp("-O0", f"-I{HERE}", *sources, "-o", folder / row, text=source(row))
    except AssertionError as error:
        return dict.fromkeys(CASES[row], str(error))
    env = amx_emulator.environment() if has_tiles(row) else None
    given = "\n".join(CASES[row])
    run = subprocess.run([folder / row], input=given, env=env, capture_output=True, text=True)
    said = run.stdout.splitlines()
    died = [f"died with status {run.returncode} {run.stderr}"] * (len(CASES[row]) - len(said))
    return dict(zip(CASES[row], said + died, strict=True))


@pytest.mark.parametrize(("row", "case"), [
    pytest.param(row, case, id=f"{row}-{case.replace(' ', '-')}") for row in RUNNABLE for case in CASES[row]
])  # fmt: skip
def test_edges(programs, row, case):
    assert results(row, programs)[case] == "ok"


REGISTERS = r"(simd|narrow|vec|chunk|dot4|math|panel|peak)\w*-inl\.h"
"""Files with arithmetic in registers, of which kernels consist."""


def functions(source: str) -> set[str]:
    """Returns the void functions: free ones, and public static ones of classes as Class::function."""
    found, name, public = set(), "", True
    for line in source.splitlines():
        if match := re.match(r"(struct|class) (\w+).*\{$", line):
            name, public = match.group(2), match.group(1) == "struct"
        elif line in ("public:", "private:"):
            public = line == "public:"
        elif line == "};":
            name = ""
        elif match := re.match(r"(?:inline )?(?:__attribute__\(\(\w+\)\) )?void (\w+)\(", line):
            found.add(match.group(1))
        elif name and public and (match := re.match(r"    static void (\w+)\(", line)):
            found.add(f"{name}::{match.group(1)}")
    return found


def calls(source: str, function: str) -> bool:
    """Returns True if a function is called; members may be called through any alias of their class."""
    owner, _, member = function.rpartition("::")
    return bool(
        re.search(rf"\b{owner}\b", source) and re.search(rf"{'::' if owner else ''}\b{member}\(", source)
    )


def in_tables() -> set[str]:
    """Returns the functions of formats whose address weights/decode-inl.h takes."""
    source = (CSRC / "weights" / "decode-inl.h").read_text()
    aliases = dict(re.findall(r"using (\w+) = (\w+)<", source))
    taken = re.findall(r"&(\w+)(?:<[^;]*?>)?::(?:template )?(\w+)", source)
    return {f"{aliases.get(owner, owner)}::{name}" for owner, name in taken}


def test_every_kernel_is_listed():
    """Covers what other folders call in files of isa/ that are not about registers, and format functions."""
    isa = {path.name: functions(path.read_text()) for path in CSRC.glob("isa/*-inl.h")}
    others = "\n".join(path.read_text() for path in CSRC.glob("*/*-inl.h") if path.parent.name != "isa")
    kernels = set().union(*(found for name, found in isa.items() if not re.fullmatch(REGISTERS, name)))
    called = {function for function in kernels if calls(others, function)}
    listed = {function for _, _, function in LINES}
    assert {"MicroGemm::gemm", "pack_nt"} <= called and "CodeKernels::dots" in in_tables()
    assert called | in_tables() <= listed <= in_tables().union(*isa.values())
    assert {suite for _, suite, _ in LINES} == set(EDGES)
