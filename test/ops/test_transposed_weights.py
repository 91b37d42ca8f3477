"""Weights stored as [E, in, out], given as transposed views: results, gradients and their layout."""

import pytest
import torch

import ktops
from ktops.testing.compare import check_against_reference, random_grad_output, run
from ktops.testing.counts import counted
from ktops.testing.inputs import moe_inputs, require_grad
from ktops.testing.paths import use_path

WEIGHTS = ("gate_up_proj", "down_proj")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def transposed(inputs: dict, *names: str) -> dict:
    """Returns inputs whose weights (all or the named ones) are views of contiguous [E, in, out] tensors."""
    return inputs | {name: inputs[name].mT.contiguous().mT for name in names or WEIGHTS}


@pytest.mark.parametrize("save", ["activations", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results(isa, dtype, save):
    """Covers sizes that are not multiples of a panel, with few and with many rows per expert."""
    for num_tokens, routing in ((5, "random"), (150, "skewed")):
        sizes = {"T": num_tokens, "H": 75, "I": 51, "E": 4, "K": 2, "bias": True, "lora_rank": (3, 5)}
        check_against_reference(transposed(moe_inputs(dtype=dtype, routing=routing, **sizes)), save=save)


@pytest.mark.parametrize("name", WEIGHTS)
def test_one_transposed_weight(isa, name):
    inputs = moe_inputs(T=40, H=48, I=80, E=4, K=2, dtype=torch.bfloat16)
    check_against_reference(transposed(inputs, name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_panels_hold_the_same_weights(isa, dtype):
    inputs = moe_inputs(T=60, H=75, I=300, E=3, K=2, dtype=dtype, bias=True, lora_rank=3)
    grad_output = random_grad_output(inputs)
    with use_path("panels"):
        expected, actual = (run(x, grad_output) for x in (inputs, transposed(inputs)))
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def test_gradients_reach_the_parameters_without_a_copy(isa):
    inputs = moe_inputs(T=9, H=24, I=20, E=4, K=2, dtype=torch.bfloat16)
    parameters = {name: inputs[name].mT.contiguous().requires_grad_() for name in WEIGHTS}
    output = ktops.moe_sft(**inputs | {name: parameter.mT for name, parameter in parameters.items()})
    grad_output = random_grad_output(inputs)
    with counted() as counts:
        output.backward(grad_output)
    assert counts.operators["aten::empty"] == 2 and counts.operators["aten::copy_"] == 0
    assert counts.allocations == [parameter.nbytes for parameter in parameters.values()]
    expected = require_grad(inputs, *WEIGHTS)
    with use_path("panels"):
        ktops.moe_sft(**expected).backward(grad_output)
    for name, parameter in parameters.items():
        assert parameter.grad.is_contiguous()
        torch.testing.assert_close(parameter.grad.mT, expected[name].grad)


def test_gradients_of_experts_without_tokens_are_zeros(isa):
    inputs = transposed(moe_inputs(T=3, H=24, I=20, E=8, K=1, routing="one_expert"))
    idle = [e for e in range(8) if e not in inputs["topk_ids"]]
    results = run(inputs, random_grad_output(inputs), WEIGHTS)
    assert idle and not any(results[name][idle].any() for name in WEIGHTS)


@pytest.mark.parametrize("save", ["activations", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads(isa, dtype, save):
    before = torch.get_num_threads()
    inputs = transposed(moe_inputs(T=70, H=96, I=150, E=6, K=3, dtype=dtype, lora_rank=4, routing="skewed"))
    grad_output = random_grad_output(inputs)
    try:
        torch.set_num_threads(1)
        expected = run(inputs, grad_output, save=save)
        for num_threads in (2, 7):
            torch.set_num_threads(num_threads)
            for name, value in run(inputs, grad_output, save=save).items():
                assert torch.equal(value, expected[name]), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning a function")
def test_compiled_equals_eager():
    inputs = require_grad(transposed(moe_inputs(T=4, H=8, I=6, E=3, K=2)), *WEIGHTS)
    torch._dynamo.reset()
    compiled = torch.compile(ktops.moe_sft, backend="aot_eager", fullgraph=True)
    actual, expected = (
        torch.autograd.grad(function(**inputs).sum(), [inputs[name] for name in WEIGHTS])
        for function in (compiled, ktops.moe_sft)
    )
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.mT.is_contiguous()
