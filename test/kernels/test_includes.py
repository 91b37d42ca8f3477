"""Files compiled for each ISA can be included in any order, and no other files are in the target region."""

import re

import pytest
from rows import CSRC, ROWS, SHARED, compile_cpp, reached

FILES = sorted(str(path.relative_to(CSRC)) for path in CSRC.glob("*/*-inl.h"))
REACHED = {row: reached(f"dispatch/{row}.cpp") for row in [*ROWS, *SHARED]}


@pytest.fixture(scope="module")
def precompiled(tmp_path_factory):
    """Describes the simplest ISA, in the form that compiles fastest."""
    folder = tmp_path_factory.mktemp("precompiled")
    (folder / "scalar.h").write_text('#include "dispatch/scalar.h"\n')
    compile_cpp("-x", "c++-header", folder / "scalar.h", "-o", folder / "scalar.h.gch")
    return folder


@pytest.mark.parametrize("name", FILES)
def test_includes_what_it_uses(precompiled, name):
    """The file compiles when included first, right after the description of the simplest ISA that uses it."""
    row = next((row for row in REACHED if name in REACHED[row]), None)
    assert row, "no kernels include it"
    header = precompiled / "scalar.h" if row == "scalar" else f"dispatch/{row}.h"
    compile_cpp("-fsyntax-only", "-x", "c++", "-", text=f'#include "{header}"\n#include "{name}"\n')


@pytest.mark.parametrize("row", [row for row in REACHED if row != "scalar"])
def test_no_other_header_is_compiled_for_a_row(row):
    """The linker may keep an inline function's copy with the ISA's instructions, for all callers."""
    text = compile_cpp("-E", CSRC / "dispatch" / f"{row}.cpp")
    before, region = (
        set(re.findall(r'^# \d+ "([^"]+)" 1', part, re.MULTILINE))
        for part in text.rsplit("#pragma GCC push_options", 1)
    )
    kernels = "weights/format_kernels-inl.h" if row in SHARED else "moe/forward-inl.h"
    assert any(name.endswith(kernels) for name in region)
    assert not [name for name in region - before if not name.endswith(("-inl.h", ".def"))]
