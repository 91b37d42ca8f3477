"""The order of the rows of kernels: best first, on the CPU at hand."""

import torch

import ktops

ROWS = ktops.cpu_capabilities()


def peak(isa: str) -> float:
    """FLOP/s in bfloat16 of one thread: the best of many short runs, since others use the CPU too."""
    return max(torch.ops.kt.measure_peak(isa, "bfloat16", 20_000) for _ in range(50))


def test_the_best_row_comes_first():
    order = list(ROWS)
    assert order[0] == "amx_bf16"
    assert order[-2:] == ["avx2", "scalar"]
    first, second = order[1:3]
    assert {first, second} == {"avx512_bf16", "avx512"}
    if ROWS[first] and ROWS[second]:
        assert peak(first) > 1.25 * peak(second)
