"""Compares the errors of the op and of transformers' eager experts, both in bfloat16, relative to float64."""

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from ktops.testing.budgets import relative_error
from ktops.testing.compare import random_grad_output, run, run_reference
from ktops.testing.inputs import floating, moe_inputs, require_grad

SHAPES = {
    "qwen3_30b": {"T": 64, "H": 2048, "I": 768, "E": 8, "K": 4},
    "dsv2_lite": {"T": 48, "H": 2048, "I": 1408, "E": 4, "K": 3},
    "mixtral_small": {"T": 24, "H": 2048, "I": 7168, "E": 2, "K": 2},
}
"""Real sizes with few tokens and experts."""


def eager_experts(inputs: dict, grad_output: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns what ktops.testing.compare.run returns, from transformers' eager loop over experts."""
    num_experts, hidden_size, intermediate_size = inputs["down_proj"].shape
    config = Qwen3MoeConfig(
        hidden_size=hidden_size,
        moe_intermediate_size=intermediate_size,
        num_experts=num_experts,
        experts_implementation="eager",
    )
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    leaves = require_grad(inputs)
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, torch.nn.Parameter(leaves[name]))
    output = experts(leaves["hidden_states"], leaves["topk_ids"], leaves["topk_weights"])
    tensors = {name: leaves[name] for name in ("hidden_states", "topk_weights")}
    tensors |= {"gate_up_proj": experts.gate_up_proj, "down_proj": experts.down_proj}
    gradients = torch.autograd.grad(output, list(tensors.values()), grad_output)
    return {"output": output.detach()} | dict(zip(tensors, gradients, strict=True))


@pytest.fixture(scope="module", params=SHAPES)
def case(request):
    """(name of the shape, inputs, grad_output, results in float64, results of the eager experts)"""
    inputs = moe_inputs(**SHAPES[request.param], dtype=torch.bfloat16)
    grad_output = random_grad_output(inputs)
    exact = run_reference(inputs, grad_output)
    assert set(exact) == {"output", *floating(inputs)}
    return request.param, inputs, grad_output, exact, eager_experts(inputs, grad_output)


def test_no_less_accurate_than_eager(isa, case, capsys):
    shape, inputs, grad_output, exact, eager = case
    ours = run(inputs, grad_output)
    errors = {
        name: (relative_error(ours[name], value), relative_error(eager[name], value))
        for name, value in exact.items()
    }
    with capsys.disabled():
        print(f"\n{shape} on {isa}: error relative to float64, ktops / transformers eager")
        for name, (error, eager_error) in errors.items():
            what = "output" if name == "output" else f"gradient of {name}"
            print(f"  {what:26} {error:.3e} / {eager_error:.3e}")
    for name, (error, eager_error) in errors.items():
        assert error <= eager_error, name
