"""The order of the rows of kernels; ``python -m bench.check``: whether the best on this CPU is first."""

import ktops

ROWS = ktops.cpu_capabilities()


def test_the_best_row_comes_first():
    order = list(ROWS)
    assert order[0] == "amx_bf16"
    assert order[-2:] == ["avx2", "scalar"]
    assert set(order[1:3]) == {"avx512_bf16", "avx512"}
