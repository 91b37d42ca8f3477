"""Compares ktops.reference, the specification, with autograd through one route at a time."""

import pytest
import torch

from ktops import reference
from ktops.testing.activations import ACTIVATION_CASES
from ktops.testing.budgets import relative_error, rounding_level
from ktops.testing.compare import assert_matches_reference, one_thread, random_grad_output, run_reference
from ktops.testing.inputs import ROUTINGS, floating, moe_inputs, op_arguments, require_grad
from ktops.testing.naive import moe_naive


@one_thread()
def assert_reference_is_naive(inputs: dict) -> None:
    grad_output = random_grad_output(inputs)
    names = floating(inputs)
    leaves = require_grad(inputs)
    output = moe_naive(leaves)
    gradients = torch.autograd.grad(
        output, [leaves[name] for name in names], grad_output, materialize_grads=True
    )
    naive = {"output": output.detach()} | dict(zip(names, gradients, strict=True))
    assert_matches_reference(naive, inputs, grad_output)


SIZES = {"T": 7, "H": 6, "I": 5, "E": 4, "K": 2, "dtype": torch.float64}


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lora_rank", [0, 3, (2, 0), (0, 2), (1, 4)])
def test_terms(lora_rank, bias, reduce):
    inputs = moe_inputs(**SIZES, lora_rank=lora_rank, bias=bias)
    assert_reference_is_naive(inputs | {"reduce": reduce})


@pytest.mark.parametrize("activation", ACTIVATION_CASES, ids=str)
def test_activations(activation):
    inputs = moe_inputs(**SIZES, lora_rank=(1, 4), bias=True, gating=activation.gating)
    assert_reference_is_naive(inputs | activation.options)


@pytest.mark.parametrize("invalid_ids", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing, invalid_ids):
    assert_reference_is_naive(
        moe_inputs(
            T=9,
            H=4,
            I=3,
            E=5,
            K=3,
            dtype=torch.float64,
            lora_rank=2,
            bias=True,
            routing=routing,
            invalid_ids=invalid_ids,
        )
    )


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
def test_few_tokens(num_tokens):
    assert_reference_is_naive(
        moe_inputs(T=num_tokens, H=4, I=3, E=5, K=2, dtype=torch.float64, lora_rank=2, bias=True)
    )


def test_recompute_is_exact():
    inputs = moe_inputs(
        T=9, H=6, I=5, E=4, K=2, dtype=torch.float64, lora_rank=2, bias=True, invalid_ids=True
    )
    grad_output = random_grad_output(inputs)
    arguments = op_arguments(inputs)
    output, gate_up, xa, ha = reference.moe_sft_fwd(arguments, "recompute")
    assert gate_up.shape == (0, 10)
    gradients = reference.moe_sft_bwd(grad_output, arguments, "recompute", gate_up, xa, ha, (1 << 10) - 1)
    expected = run_reference(inputs, grad_output)
    for actual, value in zip((output, *gradients), expected.values(), strict=True):
        assert relative_error(actual, value) <= 2 * rounding_level(torch.float64, 20)


def test_inference_is_the_output():
    inputs = moe_inputs(T=9, H=6, I=5, E=4, K=2, dtype=torch.float64, lora_rank=2, bias=True)
    output, *_ = reference.moe_sft_fwd(op_arguments(inputs), "activations")
    assert torch.equal(reference.moe_fwd(op_arguments(inputs)), output)
