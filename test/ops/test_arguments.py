"""The list of arguments in Python is that of the registered schemas."""

import typing

import pytest
import torch
from torch import Tensor

from ktops.ops.arguments import ATTRIBUTES, FORWARD, GRADIENTS, TENSORS, MoeArguments, pick

SHARED = typing.get_type_hints(MoeArguments)
SAVED = {"saved_gate_up": Tensor, "saved_xa": Tensor, "saved_ha": Tensor}
SCHEMAS = {
    "moe_fwd": SHARED,
    "moe_sft_fwd": SHARED | {"save": str},
    "moe_sft_bwd": {"grad_output": Tensor} | SHARED | {"save": str} | SAVED | {"grad_mask": int},
}
TYPES = {
    "Tensor": Tensor,
    "Optional[Tensor]": Tensor | None,
    "int": int,
    "float": float,
    "str": str,
    "List[float]": list[float],
}


def schema(op: str) -> torch._C.FunctionSchema:
    return getattr(torch.ops.kt, op).default._schema


@pytest.mark.parametrize("op", SCHEMAS)
def test_names_and_types_of_each_schema(op):
    registered = [(argument.name, TYPES[str(argument.type)]) for argument in schema(op).arguments]
    assert registered == list(SCHEMAS[op].items())


def test_results_of_training():
    output, *saved = (result.name for result in schema("moe_sft_fwd").returns)
    assert (output, saved) == ("output", list(SAVED))
    assert [result.name for result in schema("moe_sft_bwd").returns] == [f"grad_{name}" for name in GRADIENTS]


def test_tensors_come_before_attributes():
    """Backward puts them together in this order."""
    assert (*TENSORS, *ATTRIBUTES) == FORWARD
    assert {SHARED[name] for name in TENSORS} == {Tensor, Tensor | None}
    assert set(GRADIENTS) <= set(TENSORS)


def test_pick():
    assert pick("save", "topk_ids")(FORWARD) == ("save", "topk_ids")
