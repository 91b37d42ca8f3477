"""The list of arguments in Python matches the registered schemas."""

import typing

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ktops
from ktops.ops.arguments import ATTRIBUTES, FORWARD, GRADIENTS, TENSORS, MoeArguments, pick
from ktops.testing.inputs import moe_inputs, op_arguments, require_grad

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
    "bool": bool,
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
    assert (output, saved) == ("output", [*SAVED, *(f"host_{name}" for name in TENSORS[:3])])
    assert [result.name for result in schema("moe_sft_bwd").returns] == [f"grad_{name}" for name in GRADIENTS]


def test_tensors_come_before_attributes():
    """Backward assembles them in this order."""
    assert (*TENSORS, *ATTRIBUTES) == FORWARD
    assert {SHARED[name] for name in TENSORS} == {Tensor, Tensor | None}
    assert set(GRADIENTS) <= set(TENSORS)


def test_pick():
    assert pick("save", "topk_ids")(FORWARD) == ("save", "topk_ids")


class Calls(TorchDispatchMode):
    """Records the arguments of every call of an MoE operator."""

    def __init__(self):
        super().__init__()
        self.arguments = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.kt.moe_fwd.default, torch.ops.kt.moe_sft_fwd.default):
            self.arguments.append(MoeArguments(*args[: len(MoeArguments._fields)]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_the_function_passes_each_in_its_place(training):
    inputs = moe_inputs(T=5, H=64, I=32, E=3, K=2, lora_rank=(2, 3), bias=True)
    inputs["gate_up_proj"] = ktops.quantize(inputs["gate_up_proj"], "uint4", group_size=32)
    inputs["down_proj"] = ktops.quantize(inputs["down_proj"], "int4", group_size=0)
    if training:
        inputs = require_grad(inputs, "down_lora_B")
    options = {"activation": "swiglu_clamped", "activation_args": [7.0, 1.5, 1.0], "compute": "bf16"}
    options |= {"gating": "interleaved", "reduce": False}
    with Calls() as calls:
        ktops.moe_sft(**inputs, **options)
    (given,) = calls.arguments
    for name, expected in op_arguments(inputs, **options)._asdict().items():
        actual = getattr(given, name)
        assert torch.equal(actual, expected) if isinstance(expected, Tensor) else actual == expected, name
