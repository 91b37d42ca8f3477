"""kt::measure_peak: every ISA and dtype has a rate, and wrong arguments have an error."""

import math

import pytest
import torch

import ktops

ISAS = [name for name, runs in ktops.cpu_capabilities().items() if runs]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("dtype", "from_l2"),
    [("bfloat16", False), ("float32", False), ("int8", False), ("bfloat16", True), ("float32", True)],
)
def test_rates(isa, dtype, from_l2):
    rate = torch.ops.kt.measure_peak(isa, dtype, 2, from_l2)
    assert math.isfinite(rate) and rate > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("avx3", "float32", 1), "isa must be one of amx_bf16, .*, scalar, got 'avx3'"),
        (("scalar", "fp8", 1), "dtype must be one of bfloat16, float32, int8, got 'fp8'"),
        (("scalar", "int8", 1, True), "dtype must be bfloat16 or float32 if from_l2 is set, got 'int8'"),
        (("scalar", "float32", 0), "iterations must be positive, got 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(RuntimeError, match=f"kt::measure_peak: {message}"):
        torch.ops.kt.measure_peak(*arguments)
