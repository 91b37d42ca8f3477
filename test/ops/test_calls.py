"""Counts the overhead of a call: operators, tensors, Python functions, thread launches.

How long it takes depends on the machine; see ``python -m bench.check``.
"""

import sys
from pathlib import Path

import pytest
import torch

import ktops
from ktops.ops.arguments import GRADIENTS
from ktops.testing.compare import random_grad_output, run
from ktops.testing.counts import counted
from ktops.testing.inputs import moe_inputs, require_grad

SIZES = {"H": 64, "I": 32, "E": 6, "K": 2}
TOKENS, RANK = 5, 4
ROUTES = TOKENS * SIZES["K"]
VARIANTS = {
    "plain": {},
    "LoRA": {"lora_rank": RANK},
    "LoRA in float32": {"lora_rank": RANK, "lora_dtype": torch.float32},
    "biases, float32 weights of routes": {"bias": True, "weights_dtype": torch.float32},
    "int32 ids, some invalid": {"ids_dtype": torch.int32, "invalid_ids": True},
}


@pytest.fixture(autouse=True)
def poison():
    """Leaves memory unfilled, because filling it would count."""


def inputs_of(variant: str = "plain") -> dict:
    return moe_inputs(T=TOKENS, **SIZES, dtype=torch.bfloat16, **VARIANTS[variant])


def quantized(weight_format: str) -> dict:
    inputs = inputs_of("LoRA")
    weights = {name: ktops.quantize(inputs[name], weight_format) for name in ("gate_up_proj", "down_proj")}
    return inputs | weights


def test_counts_are_those_of_the_block():
    kept = torch.ones(100)
    with counted() as counts:
        for _ in range(3):
            kept = kept.neg()
    assert counts.operators == {"aten::neg": 3}
    assert counts.allocations == [400] * 3 and counts.peak == 800
    with counted() as counts:
        torch.cat([kept, kept.neg()])
    assert counts.operators["aten::cat"] == 1 and counts.peak == 400 + 800


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_is_one_operator_and_one_tensor(isa, variant):
    inputs = inputs_of(variant)
    with torch.no_grad(), counted() as counts:
        output = ktops.moe_sft(**inputs)
    assert counts.operators == {"kt::moe_fwd": 1, "aten::empty": 1}
    assert counts.allocations == [output.nbytes]


@pytest.mark.parametrize("compute", ["bf16", "int8"])
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_weights_in_a_format_add_no_operator(isa, weight_format, compute):
    inputs = quantized(weight_format)
    with torch.no_grad(), counted() as counts:
        output = ktops.moe_sft(**inputs, compute=compute)
    assert counts.operators == {"kt::moe_fwd": 1, "aten::empty": 1}
    assert counts.allocations == [output.nbytes]


@pytest.mark.parametrize("save", ["activations", "recompute"])
def test_training_allocates_what_it_returns_and_what_it_saves(isa, save):
    trained = ("hidden_states", "topk_weights", *(name for name in GRADIENTS if "lora" in name))
    inputs = require_grad(inputs_of("LoRA"), *trained)
    grad_output = random_grad_output(inputs)
    with counted() as counts:
        output = ktops.moe_sft(**inputs, save=save)
    gate_up = 0 if save == "recompute" else 2 * ROUTES * 2 * SIZES["I"]
    saved = [gate_up, 2 * ROUTES * RANK, 2 * ROUTES * RANK]
    assert counts.operators == {"kt::moe_sft_fwd": 1, "aten::empty": 4}
    assert counts.allocations == [nbytes for nbytes in (output.nbytes, *saved) if nbytes]
    with counted() as counts:
        gradients = torch.autograd.grad(output, [inputs[name] for name in trained], grad_output)
    assert counts.operators == {"kt::moe_sft_bwd": 1, "aten::empty": len(trained)}
    assert counts.allocations == [gradient.nbytes for gradient in gradients]


def test_factors_as_peft_stores_them_are_not_copied(isa):
    """Returns LoRA tensors with the expert innermost in B, and A transposed."""
    inputs = inputs_of("LoRA")
    for prefix in ("gate_up", "down"):
        a, b = (inputs[f"{prefix}_lora_{factor}"] for factor in "AB")
        inputs[f"{prefix}_lora_A"] = a.mT.contiguous().mT
        inputs[f"{prefix}_lora_B"] = b.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    with torch.no_grad(), counted() as counts:
        output = ktops.moe_sft(**inputs)
    assert counts.allocations == [output.nbytes]


def functions_called(function) -> list[str]:
    """Returns the names of the Python functions of ktops that a call runs, except generators."""
    package, names = str(Path(ktops.__file__).parent), []

    def record(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package) and code.co_name.isidentifier():
            names.append(code.co_name)

    sys.setprofile(record)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize("variant", ["plain", "LoRA"])
def test_a_call_is_one_function_of_python(variant):
    inputs = inputs_of(variant)
    with torch.no_grad():
        assert functions_called(lambda: ktops.moe_sft(**inputs)) == ["moe_sft"]
    inputs = require_grad(inputs, "hidden_states")
    assert functions_called(lambda: ktops.moe_sft(**inputs)) == ["moe_sft", "_setup_context"]


@pytest.mark.parametrize("tokens", [1, 40])
def test_each_operator_starts_its_threads_once(tokens):
    inputs = moe_inputs(T=tokens, **SIZES, dtype=torch.bfloat16, lora_rank=RANK)
    with ktops.profile() as profile:
        run(inputs, random_grad_output(inputs))
        with torch.no_grad():
            ktops.moe_sft(**inputs)
    launches = {step.op: step.calls for step in profile.steps if step.name == "launch"}
    assert launches == {"moe_sft_fwd": 1, "moe_sft_bwd": 1, "moe_fwd": 1}
