"""The error budgets can fail: a model of the kernels passes, wrong and careless models do not."""

import math

import pytest
import torch

from ktops.testing.budgets import (
    forward_budget,
    gradient_budget,
    max_row_error,
    relative_error,
    rms,
    smallest_error,
)
from ktops.testing.compare import assert_matches_reference, one_thread, random_grad_output, run_reference
from ktops.testing.inputs import floating, moe_inputs, require_grad, upcast
from ktops.testing.naive import Rounded, RoundedAccumulation, moe_naive
from ktops.testing.poison import poisoned_memory


@one_thread()
def modeled(inputs: dict, grad_output: torch.Tensor, arithmetic, skip: str = "") -> dict:
    """Returns what a kernel with this arithmetic returns; ``skip`` names an input that it ignores."""
    names = floating(inputs)
    leaves = require_grad(upcast(inputs))
    output = moe_naive(leaves, arithmetic=arithmetic, skip=skip)
    tensors = [leaves[name] for name in names]
    gradients = torch.autograd.grad(output, tensors, grad_output.double(), materialize_grads=True)
    results = {"output": output.detach()} | dict(zip(names, gradients, strict=True))
    return {
        name: value.to(inputs["hidden_states" if name == "output" else name].dtype)
        for name, value in results.items()
    }


@pytest.fixture(scope="module")
def case():
    """bfloat16 inputs with float32 LoRA, as in PEFT."""
    inputs = moe_inputs(
        T=24, H=256, I=64, E=4, K=2, dtype=torch.bfloat16, lora_rank=4, bias=True, lora_dtype=torch.float32
    )
    return inputs, random_grad_output(inputs)


@pytest.fixture(scope="module")
def good(case):
    return modeled(*case, Rounded())


@pytest.fixture(scope="module")
def careless(case):
    return modeled(*case, RoundedAccumulation())


def test_one_rounding_per_factor_passes(case, good):
    assert_matches_reference(good, *case)


@pytest.mark.parametrize("seed", range(20))
def test_one_rounding_per_factor_passes_where_sums_cancel(seed):
    inputs = moe_inputs(
        T=2,
        H=3,
        I=1,
        E=2,
        K=1 + seed % 2,
        dtype=torch.bfloat16,
        lora_rank=1 + seed % 3,
        bias=seed % 4 == 0,
        seed=seed,
    )
    grad_output = random_grad_output(inputs)
    assert_matches_reference(modeled(inputs, grad_output, Rounded()), inputs, grad_output)


@pytest.mark.parametrize("result", ["output", "hidden_states", "down_proj", "gate_up_lora_A", "down_lora_B"])
def test_rounded_sums_fail(case, good, careless, result):
    with pytest.raises(AssertionError, match=f"{result}: relative error"):
        assert_matches_reference(good | {result: careless[result]}, *case)


FORGOTTEN = ("gate_up_bias", "down_bias", "gate_up_lora_B", "down_lora_B", "gate_up_scaling", "down_scaling")


@pytest.mark.parametrize("skip", FORGOTTEN)
def test_missing_terms_fail(case, skip):
    with pytest.raises(AssertionError, match="relative error"):
        assert_matches_reference(modeled(*case, Rounded(), skip=skip), *case)


@pytest.mark.parametrize("name", ["output", "hidden_states", "gate_up_lora_A"])
def test_one_wrong_element_fails(case, good, name):
    results = good | {name: good[name].clone()}
    results[name].view(-1)[5] += 0.2 * results[name].float().abs().max()
    with pytest.raises(AssertionError, match=name.replace("output", "output: ")):
        assert_matches_reference(results, *case)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_non_finite_element_fails(case, good, value):
    results = good | {"down_proj": good["down_proj"].clone()}
    results["down_proj"].view(-1)[7] = value
    with pytest.raises(AssertionError, match="gradient of down_proj"):
        assert_matches_reference(results, *case)


def test_wrong_dtype_and_shape_fail(case, good):
    with pytest.raises(AssertionError, match=r"output: torch\.float32 instead of torch\.bfloat16"):
        assert_matches_reference(good | {"output": good["output"].float()}, *case)
    with pytest.raises(AssertionError, match="gradient of hidden_states: shape"):
        assert_matches_reference(good | {"hidden_states": good["hidden_states"][:-1]}, *case)


def test_budgets_without_a_case(case, good, careless):
    expected = run_reference(*case)
    for name, value in expected.items():
        budget = forward_budget if name == "output" else gradient_budget
        assert relative_error(good[name], value) <= budget(torch.bfloat16)
    assert relative_error(careless["output"], expected["output"]) > forward_budget(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_of_one_rounding(dtype):
    x = torch.randn(1 << 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative_error(x.to(dtype), x) == pytest.approx(rms(dtype), rel=0.1)


def test_smallest_error():
    x = torch.rand(1 << 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2**-14
    error = (x.to(torch.float16).double() - x).square().mean().sqrt().item()
    assert error == pytest.approx(smallest_error(torch.float16), rel=0.1)


def test_error_measures():
    reference = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    assert relative_error(reference, reference) == 0
    assert relative_error(torch.empty(0, 3), torch.empty(0, 3)) == 0
    assert relative_error(reference * 1.5, reference) == pytest.approx(0.5)
    assert relative_error(torch.full((2,), math.nan), torch.ones(2)) == math.inf
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    wrong = reference.clone()
    wrong[1, 0] += 0.5
    assert relative_error(wrong, reference) == pytest.approx(0.0995, rel=1e-3)
    assert max_row_error(wrong, reference) == pytest.approx(0.5 / (0.5 / 2**0.5))
    with pytest.raises(AssertionError, match=r"shape \[2, 2\] instead of \[1, 2\]"):
        relative_error(reference, reference[:1])


def test_poisoned_memory_is_nan():
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
        assert torch.empty(1000, dtype=torch.bfloat16).isnan().all()
        assert torch.empty_like(torch.ones(3)).isnan().all()
