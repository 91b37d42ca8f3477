"""``python -m bench.memory``: a call allocates what forward saves, the results and one block, by count.

``python -m bench.check`` checks resident memory.
"""

import torch

import ktops
from bench import memory
from bench.layer import Layer
from bench.shapes import Shape
from ktops.testing.counts import counted

SHAPE = Shape("wide", 64, 2048, 4, 2)
TOKENS, RANK = 2048, 4
GATE_UP = 2 * TOKENS * SHAPE.top_k * 2 * SHAPE.intermediate_size
"""Bytes of [g | u] of all routes: 32 MiB."""

PER_THREAD = 2 * memory.MIB + 2 * 256 * TOKENS
"""Panels, blocks and sums that fit in L2, and 256 columns of h for every row of an expert."""


def scratch_bound(threads: int) -> int:
    """Returns the bytes of [dg | du], the r-wide products, a row of H per route, an accumulator per route and
    64 columns of I, and each thread's own.
    """
    routes = TOKENS * SHAPE.top_k
    narrow = routes * (2 * 2 * RANK + 4 * SHAPE.hidden_size + 4 * SHAPE.intermediate_size // 64 + 4)
    return GATE_UP + narrow + threads * PER_THREAD + memory.MIB


def measure(save: str, layer: Layer | None = None, tokens: int = TOKENS, rank: int = RANK) -> memory.Usage:
    """Measures like bench.memory, but extra is the bytes that PyTorch and the operators allocated."""
    ktops.empty_cache()
    layer = layer or Layer(SHAPE, seed=0)
    inputs, _ = layer.inputs(tokens), layer.adapters(rank)
    with counted() as counts:
        results = memory.call(layer, inputs, rank, save)
    scratch = ktops.memory_stats()["bytes_peak"]
    allocated = counts.peak - sum(tensor.nbytes for tensor in results)
    return memory.Usage(allocated + scratch, memory.saved_bytes(layer.shape, tokens, rank, save), scratch)


def test_saved_activations():
    usage = measure("activations")
    assert usage.saved == GATE_UP + 2 * TOKENS * SHAPE.top_k * 2 * RANK
    assert GATE_UP <= usage.scratch <= scratch_bound(torch.get_num_threads())
    assert usage.extra == usage.saved + usage.scratch


def test_recompute_needs_no_more_scratch():
    usage, other = measure("recompute"), measure("activations")
    assert usage.saved == other.saved - GATE_UP
    assert usage.scratch == other.scratch
    assert usage.extra == usage.saved + usage.scratch


def test_no_copy_of_the_weights():
    """With 48 MiB of weights and 32 tokens, forward and backward add less than a quarter of the weights."""
    layer = Layer(Shape("weights", 1024, 512, 16, 2), seed=0)
    weights = layer.gate_up_proj.nbytes + layer.down_proj.nbytes
    assert weights == 48 * memory.MIB
    assert measure("activations", layer, tokens=32, rank=0).extra < weights / 4


def test_table(capsys):
    arguments = ["--shape", "64,48,8,2", "--rank", "4", "--tokens", "3", "40", "--limit"]
    assert memory.main([*arguments, "1000000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[-2:]] == ["3", "40"]
    assert memory.main([*arguments, "-1000000"]) == 1
