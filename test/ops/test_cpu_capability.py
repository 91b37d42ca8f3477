"""The order of the kernels; ``python -m bench.check`` checks that the best on this CPU come first."""

import re
from pathlib import Path

import ktops

LIST = Path(__file__).parents[2] / "ktops_csrc" / "isa" / "rows.def"
ROWS = ktops.cpu_capabilities()


def test_the_best_row_comes_first():
    """The order is that of the list, except for two that may come in either order."""
    listed = re.findall(r"^KT_ROW\((\w+)\)$", LIST.read_text(), re.MULTILINE)
    either = {"avx512_bf16", "avx512"}
    assert [row for row in ROWS if row not in either] == [row for row in listed if row not in either]
    first = listed.index("avx512_bf16")
    assert set(listed[first : first + 2]) == set(list(ROWS)[first : first + 2]) == either
