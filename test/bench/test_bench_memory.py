"""python -m bench.memory: resident memory of a call stays within what forward saves and one block."""

import mmap

import torch

import ktops
from bench import memory
from bench.layer import Layer
from bench.shapes import Shape

SHAPE = Shape("wide", 64, 2048, 4, 2)
TOKENS, RANK = 2048, 4
GATE_UP = 2 * TOKENS * SHAPE.top_k * 2 * SHAPE.intermediate_size
"""Bytes of [g | u] of every route: 32 MiB."""

PER_THREAD = 2 * memory.MIB + 2 * 256 * TOKENS
"""Panels, blocks and sums that fit in L2, and 256 columns of h for every row of an expert."""


def scratch_bound(threads: int) -> int:
    """[dg | du], the r-wide products, a route's row of H, an accumulator a route and 64 columns of I, and the
    threads' own.
    """
    routes = TOKENS * SHAPE.top_k
    narrow = routes * (2 * 2 * RANK + 4 * SHAPE.hidden_size + 4 * SHAPE.intermediate_size // 64 + 4)
    return GATE_UP + narrow + threads * PER_THREAD + memory.MIB


def test_peak_of_resident_memory_is_seen():
    memory.reset_peak()
    before = memory.resident_bytes()
    fresh = mmap.mmap(-1, 40 * memory.MIB)  # malloc may hand out pages that are resident
    torch.frombuffer(fresh, dtype=torch.uint8).fill_(1)
    assert 35 < (memory.resident_bytes(peak=True) - before) / memory.MIB < 60
    fresh.close()
    memory.reset_peak()
    assert memory.resident_bytes(peak=True) - before < 35 * memory.MIB


def measure(save: str) -> memory.Usage:
    ktops.empty_cache()
    return memory.measure(Layer(SHAPE, seed=0), TOKENS, RANK, save)


def test_saved_activations():
    """Beyond saved and scratch: slack of 8 MiB for what malloc and PyTorch do on the way."""
    usage = measure("activations")
    bound = scratch_bound(torch.get_num_threads())
    assert usage.saved == GATE_UP + 2 * TOKENS * SHAPE.top_k * 2 * RANK
    assert GATE_UP <= usage.scratch <= bound
    assert usage.extra <= usage.saved + bound + 8 * memory.MIB


def test_recompute_needs_no_more_scratch():
    usage, other = measure("recompute"), measure("activations")
    assert usage.saved == other.saved - GATE_UP
    assert usage.scratch == other.scratch
    assert usage.extra <= usage.saved + scratch_bound(torch.get_num_threads()) + 8 * memory.MIB


def test_no_copy_of_the_weights():
    """48 MiB of weights, 32 tokens: forward and backward add less than a quarter of them."""
    shape = Shape("weights", 1024, 512, 16, 2)
    layer = Layer(shape, seed=0)
    weights = layer.gate_up_proj.nbytes + layer.down_proj.nbytes
    assert weights == 48 * memory.MIB
    assert memory.measure(layer, 32, 0).extra < weights / 4


def test_table(capsys):
    assert memory.main(["--shape", "64,48,8,2", "--tokens", "3", "40", "--rank", "4", "--limit", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[-2:]] == ["3", "40"]
    assert memory.main(["--shape", "64,48,8,2", "--tokens", "40", "--rank", "4", "--limit", "-100"]) == 1
