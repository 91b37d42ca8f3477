"""Reading takes the memory of the result plus less than that of two experts, converting only the latter.

The tests count the bytes that PyTorch, NumPy and Python allocate and the scratch memory of the operators.
Pages of mapped files do not count, since the system can drop them.
"""

import io
import tracemalloc

import pytest
import torch
from rich.console import Console
from tiny_checkpoints import write_per_expert
from tiny_schemes import awq, fp8_channel, gptq, plain

import ktops
from ktops.checkpoints import open_checkpoint
from ktops.cli.convert import Options, convert
from ktops.testing.counts import counted

NUM_EXPERTS = 8
SIZES = {"num_experts": NUM_EXPERTS, "hidden": 1024, "intermediate": 1024, "layers": 1}
WEIGHTS = 3 * 1024 * 1024

pytestmark = pytest.mark.usefixtures("single_thread")


def peak_bytes(function) -> int:
    """Returns the largest number of bytes that a call had allocated at once."""
    ktops.empty_cache()
    with counted() as counts:
        tracemalloc.start()
        try:
            function()
            python = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    return counts.peak + python + ktops.memory_stats()["bytes_peak"]


@pytest.mark.parametrize("allocate", [lambda: torch.ones(3 << 20), lambda: bytearray(12 << 20)])
def test_bytes_are_seen(allocate):
    assert 1 <= peak_bytes(allocate) / (12 << 20) < 1.1


def repeated(make):
    """Uses one matrix for all, because generating random ones takes most of the time."""
    made = {}

    def remembered(rng, rows, columns):
        key = rows, columns
        if key not in made:
            made[key] = make(rng, rows, columns)
        tensors, dense = made[key]
        return {name: tensor.clone() for name, tensor in tensors.items()}, dense[:1, :1]

    return remembered


CASES = {
    "bf16": (plain(torch.bfloat16), "", 2, "concatenated"),
    "bf16 interleaved": (plain(torch.bfloat16), "", 2, "interleaved"),
    "fp8": (fp8_channel, "", 1, "concatenated"),
    "gptq": (gptq, "", 0.5, "concatenated"),
    "awq": (awq, "", 0.5, "concatenated"),
    "bf16 to int4": (plain(torch.bfloat16), "int4", 2, "concatenated"),
}
"""Maps names to (make, requested format, bytes per weight in the checkpoint, order of gate and up)."""


@pytest.mark.parametrize("case", CASES)
def test_peak(tmp_path, case):
    make, weight_format, bytes_per_weight, gating = CASES[case]
    write_per_expert(tmp_path, repeated(make), **SIZES)
    layer = open_checkpoint(tmp_path).layers[0].ordered(gating)
    options = {"weight_format": weight_format, "group_size": 32} if weight_format else {}
    layer.experts(**options)
    sizes = []

    def read():
        weights = layer.read(**options)
        sizes.append(weights.gate_up_proj.nbytes + weights.down_proj.nbytes)

    besides = peak_bytes(read) - sizes[0]
    assert sizes[0] > WEIGHTS * NUM_EXPERTS / 2
    assert besides < 2 * WEIGHTS * bytes_per_weight


def test_peak_of_convert(tmp_path):
    """Allocates at most two of four experts in bf16, plus what Python needs for names and the report."""
    source, size = tmp_path / "source", 1024
    source.mkdir()
    write_per_expert(
        source, repeated(plain(torch.bfloat16)), num_experts=4, layers=1, hidden=size, intermediate=size
    )
    console = Console(file=io.StringIO())
    peak = peak_bytes(lambda: convert(Options(source, tmp_path / "converted", "int4"), console))
    assert 0 < peak < 2 * 3 * size * size * 2 + (4 << 20)
