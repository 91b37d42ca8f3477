"""``bench.quantize``: what it measures, and the bytes it counts."""

import torch

from bench import quantize
from ktops.formats import get_format, names


def test_every_method_of_every_format_with_kernels():
    wanted = [name for name in names(written=True) if get_format(name).has_quantizer]
    found = list(quantize.variants(wanted))
    assert {(name, method) for name, _, method in found} == {
        (name, method) for name in wanted for method in get_format(name).methods
    }
    assert ("int4", 128, "mse") in found and ("mxfp4", 32, "rtn") in found and ("q4_k", 0, "rtn") in found


def test_rates(monkeypatch):
    """A weight is 2 bytes; 64 of them in int4 are 32 bytes and two scales of 2 bytes."""
    monkeypatch.setattr(quantize, "fastest", lambda function, num_threads: (function(), 0.5)[1])
    weights, moved = quantize.measure(torch.zeros(3, 4, 64).bfloat16(), "int4", 32, "rtn", 2)
    assert (weights, moved) == (3 * 4 * 64 / 0.5, 3 * 4 * (2 * 64 + 32 + 4) / 0.5)
