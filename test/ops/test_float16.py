"""float16: every number converted exactly, rounding like PyTorch's, and the range it needs in training."""

import pytest
import torch
from torch import Tensor

import ktops
from ktops.testing.budgets import gradient_budget, relative_error
from ktops.testing.compare import check_against_reference, run
from ktops.testing.inputs import moe_inputs, upcast
from ktops.testing.paths import use_path

PATTERNS = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)


def biases_through_the_op(bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns what the op makes of a bias [N]: the output, and the gradient of the routing weights, both [N].

    Each token goes to its own expert, whose only column is the bias. The output is stored by vectors, the
    gradient number by number.
    """
    num_tokens = len(bias)
    zeros = torch.zeros(1, 1, 1, dtype=dtype)
    inputs = {
        "hidden_states": zeros[0].expand(num_tokens, 1),
        "topk_ids": torch.arange(num_tokens)[:, None],
        "topk_weights": torch.ones(num_tokens, 1, dtype=dtype),
        "gate_up_proj": zeros.expand(num_tokens, 2, 1),
        "down_proj": zeros.expand(num_tokens, 1, 1),
        "down_bias": bias[:, None],
    }
    results = run(inputs, torch.ones(num_tokens, 1, dtype=dtype), ("topk_weights",))
    return results["output"][:, 0], results["topk_weights"][:, 0]


def test_every_number_is_widened_exactly(isa):
    numbers = PATTERNS.view(torch.float16)
    weight = ktops.ExpertWeight("fp16", (1, 1, len(numbers)), numbers[None, None])  # decoded in vectors
    for result in (weight.dequantize(torch.float32)[0, 0], *biases_through_the_op(numbers, torch.float32)):
        torch.testing.assert_close(result, numbers.float(), rtol=0, atol=0, equal_nan=True)


def test_every_tie_is_rounded_like_pytorch(isa):
    """Covers numbers halfway between two neighbors and next to those, overflow, subnormal numbers and NaN."""
    ends = PATTERNS.view(torch.float16).float().unique()
    ends = ends[ends.isfinite()]
    ties = (ends[1:].double() + ends[:-1].double()).mul(0.5).float()
    beyond = torch.tensor([65519.0, 65520.0, 65521.0, 1e38, torch.inf, torch.nan, 2.0**-26, 1e-40])
    numbers = torch.cat([ends, ties, ties.nextafter(torch.tensor(torch.inf)), beyond, -beyond])
    for part in numbers.split(1 << 15):
        for result in biases_through_the_op(part, torch.float16):
            torch.testing.assert_close(result, part.half(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("path", ["dots", "panels"])
def test_decoded_weights_are_rounded_like_pytorch(isa, path):
    inputs = moe_inputs(T=9, H=64, I=300, E=2, K=1, dtype=torch.float16)
    generator = torch.Generator().manual_seed(2)
    wide = {
        name: torch.randn(inputs[name].shape, generator=generator) / 8
        for name in ("gate_up_proj", "down_proj")
    }
    decoded = {name: ktops.quantize(weight, "fp32") for name, weight in wide.items()}
    with use_path(path):
        actual = ktops.moe_sft(**inputs | decoded)
        assert torch.equal(actual, ktops.moe_sft(**inputs | {k: w.half() for k, w in wide.items()}))


def test_small_gradients_need_a_scaled_loss(isa):
    """Gradients of 1e-8 become 0 in float16; times 2^22, they keep their bits."""
    inputs = moe_inputs(T=9, H=24, I=20, E=4, K=2, dtype=torch.float16, lora_rank=3)
    grad_output = torch.randn(9, 24, generator=torch.Generator().manual_seed(0))
    exact = run(inputs, grad_output.half())
    lost = run(inputs, (grad_output * 2**-28).half())
    scaled = run(inputs, (grad_output * 2**-6).half())
    for name in ("hidden_states", "gate_up_lora_A", "down_lora_B"):
        assert not lost[name].any()
        error = relative_error(scaled[name].double() * 2**6, exact[name])
        assert error <= 2 * gradient_budget(torch.float16, inner_size=40)


def test_numbers_beyond_its_range_become_infinite(isa):
    inputs = moe_inputs(T=9, H=24, I=20, E=4, K=2, dtype=torch.float16)
    inputs["down_proj"] *= 3e3
    inputs["hidden_states"] *= 10
    output, wide = ktops.moe_sft(**inputs), ktops.moe_sft(**upcast(inputs)).abs()
    assert output[wide > 65520 * 1.01].isinf().all() and output[wide < 65520 / 1.01].isfinite().all()
    assert 0 < output.isinf().sum() < output.numel()


@pytest.mark.parametrize("save", ["activations", "recompute"])
@pytest.mark.parametrize("num_tokens", [5, 100])
def test_many_terms_and_long_rows(isa, num_tokens, save):
    """Sums in float16 would be off by several percent."""
    inputs = moe_inputs(T=num_tokens, H=1100, I=520, E=2, K=1, dtype=torch.float16, lora_rank=8, bias=True)
    check_against_reference(inputs, save=save)
