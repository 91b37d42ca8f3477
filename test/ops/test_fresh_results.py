"""Results of the operators ask the system for huge pages."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import ktops
from ktops.testing.compare import random_grad_output
from ktops.testing.inputs import moe_inputs, require_grad
from ktops.testing.pages import EXIST, HUGE_PAGE, asked_for_huge_pages, huge_page_of

FRESH = 33 << 20
"""Bytes of a tensor that is in a mapping of its own: glibc maps whatever is larger than 32 MiB."""


def asked(tensors: dict[str, Tensor]) -> dict[str, bool]:
    """Returns whether the first and last huge page of every tensor of at least FRESH bytes were asked for."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.nbytes >= FRESH:
            last = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE - 1
            found[name] = all(asked_for_huge_pages(address) for address in (huge_page_of(tensor), last))
    return found


def results(sizes: dict, names: list[str]) -> dict[str, Tensor]:
    """Returns the output, what is saved for backward, and the named gradients of a call with these sizes."""
    inputs = moe_inputs(**sizes, dtype=torch.bfloat16)
    leaves = require_grad(inputs, *names)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.setdefault(f"saved_{len(saved)}", tensor), lambda tensor: tensor
    ):
        output = ktops.moe_sft(**leaves)
    own = {leaf.data_ptr() for leaf in leaves.values() if isinstance(leaf, Tensor)}
    saved = {name: tensor for name, tensor in saved.items() if tensor.data_ptr() not in own}
    grads = torch.autograd.grad(output, [leaves[name] for name in names], random_grad_output(inputs))
    return {"output": output.detach(), **saved, **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize(
    ("sizes", "names", "count"),
    [
        ({"T": 70_000, "H": 256, "I": 8, "E": 2, "K": 1}, ["hidden_states"], 2),
        ({"T": 4_400, "H": 64, "I": 1024, "E": 140, "K": 2}, ["gate_up_proj"], 2),
    ],
    ids=["tokens", "experts"],
)
def test_results_of_training(sizes, names, count):
    found = asked(results(sizes, names))
    assert len(found) == count and set(found.values()) == {EXIST}, found


def test_formats():
    weight = torch.randn(9, 2048, 2048).bfloat16()
    codes, scale, zero = torch.ops.kt.quantize(weight, "int8", 128, "rtn")
    decoded = torch.ops.kt.dequantize(codes, scale, zero, "int8", 128, 2048)
    found = asked({"codes": codes, "decoded": decoded})
    assert found == {"codes": EXIST, "decoded": EXIST}


def test_one_function_allocates_results():
    sources = (Path(__file__).parents[2] / "ktops_csrc" / "ops").glob("*.cpp")
    assert [path.name for path in sources if "stable::empty(" in path.read_text()] == ["checks.cpp"]
