"""kt::moe_fwd equals the forward of kt::moe_sft_fwd."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import ktops
from ktops import reference
from ktops.testing.activations import ACTIVATION_CASES
from ktops.testing.budgets import forward_budget, relative_error
from ktops.testing.inputs import moe_inputs, op_arguments, upcast

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


def assert_equals_training(inputs: dict) -> None:
    arguments = op_arguments(inputs)
    inference = torch.ops.kt.moe_fwd(*arguments)
    for save in ("activations", "recompute"):
        output, *_ = torch.ops.kt.moe_sft_fwd(*arguments, save)
        assert torch.equal(inference, output)


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 33])
def test_equals_training_bitwise(isa, num_tokens, dtype, reduce):
    sizes = {"T": num_tokens, "H": 40, "I": 24, "E": 5, "K": 3, "lora_rank": 4, "bias": True}
    assert_equals_training(moe_inputs(**sizes, dtype=dtype, invalid_ids=True) | {"reduce": reduce})


@pytest.mark.parametrize("activation", ACTIVATION_CASES, ids=str)
def test_activations_equal_training_bitwise(isa, activation):
    sizes = {"T": 33, "H": 40, "I": 24, "E": 5, "K": 3, "lora_rank": 4, "bias": True}
    inputs = moe_inputs(**sizes, dtype=torch.bfloat16, gating=activation.gating)
    assert_equals_training(inputs | activation.options)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 5, 80])
def test_against_the_reference(isa, num_tokens, dtype, lora_rank):
    """One token, few and many take different paths."""
    inputs = moe_inputs(
        T=num_tokens, H=136, I=72, E=8, K=4, dtype=dtype, lora_rank=lora_rank, routing="skewed"
    )
    exact = reference.moe_fwd(op_arguments(upcast(inputs)))
    output = torch.ops.kt.moe_fwd(*op_arguments(inputs))
    assert relative_error(output, exact) <= forward_budget(dtype, inner_size=144)
    assert output.dtype == dtype and output.is_contiguous()


def calls(function) -> list[str]:
    """Returns the names of the kt operators that function() calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return [event.name for event in profile.events() if event.name.startswith("kt::")]


def test_chosen_when_nothing_needs_a_gradient():
    inputs = moe_inputs(T=3, H=8, I=4, E=4, K=2, lora_rank=2)
    trained = inputs | {"gate_up_lora_A": inputs["gate_up_lora_A"].clone().requires_grad_()}
    assert calls(lambda: ktops.moe_sft(**inputs)) == ["kt::moe_fwd"]
    with torch.no_grad():
        assert calls(lambda: ktops.moe_sft(**trained)) == ["kt::moe_fwd"]
    with torch.inference_mode():
        assert calls(lambda: ktops.moe_sft(**trained)) == ["kt::moe_fwd"]
    assert set(calls(lambda: ktops.moe_sft(**trained))) == {"kt::moe_sft_fwd"}


def test_modes_see_the_operator_without_gradients():
    """If there is nothing to differentiate, the function skips PyTorch's autograd, but nothing below it."""
    inputs = moe_inputs(T=3, H=8, I=4, E=4, K=2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ktops.moe_sft(**inputs)
    assert counter.get_total_flops() == 6 * 3 * 2 * 8 * 4
    with torch.no_grad(), FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        output = ktops.moe_sft(**fake)
    assert isinstance(output, FakeTensor) and output.shape == (3, 8)
    inputs["hidden_states"].requires_grad_()
    with torch.no_grad():
        output = ktops.moe_sft(**inputs)
    assert not output.requires_grad
    assert (output * inputs["hidden_states"]).sum().requires_grad
