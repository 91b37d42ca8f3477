"""Compares timed results with ktops.reference in float32, on some tokens and some experts.

Tokens are compared row by row. The gradients of an expert's weights and adapters need all tokens of that
expert. The budgets are those of ktops.testing; a dropped expert, a wrong weight or a wrong scale exceeds them
by far. Peers that round every intermediate result are allowed a factor.
"""

import torch
from torch import Tensor

from bench.layer import Inputs, Layer, Variant
from ktops import reference
from ktops.ops.arguments import GRADIENTS, MoeArguments
from ktops.testing.budgets import SAFETY, forward_budget, gradient_budget, relative_error, safety
from ktops.testing.inputs import op_arguments

_ROWS = 4


class WrongResult(Exception):
    """Raised if the result of a timed call differs from the reference."""


def _require(name: str, error: float, budget: float) -> float:
    if not error <= budget:
        raise WrongResult(f"{name} is wrong: relative error {error:.3g}, allowed {budget:.3g}")
    return error


def _arguments(
    layer: Layer, variant: Variant, inputs: Inputs, rows: Tensor, expert: int | None = None
) -> MoeArguments:
    """Returns the reference's arguments for some tokens in float32; with an expert, for that expert alone."""
    take = slice(None) if expert is None else slice(expert, expert + 1)
    ids = inputs.topk_ids[rows]
    tokens = {
        "hidden_states": inputs.hidden_states[rows].float(),
        "topk_ids": ids if expert is None else torch.where(ids == expert, 0, -1),
        "topk_weights": inputs.topk_weights[rows].float(),
    }
    layout = variant.experts
    weights = {name: tensor[take] for name, tensor in layer.weights(layout).items()}
    adapters = layer.adapters(variant.rank, layout)
    adapters = {name: tensor.detach()[take].float() for name, tensor in adapters.items()}
    return op_arguments(tokens | weights | adapters, **layout.options)


def _rows(tokens: int) -> Tensor:
    """Returns the first token, the last and some in between."""
    return torch.linspace(0, tokens - 1, min(tokens, _ROWS)).round().long().unique()


def _gradients(
    layer: Layer, variant: Variant, inputs: Inputs, rows: Tensor, names: set[str], expert: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (reference output of rows, {name: reference gradient}) for grad_output of those rows."""
    arguments = _arguments(layer, variant, inputs, rows, expert)
    trained = names & set(layer.weights(variant.experts))
    arguments = arguments._replace(**{name: getattr(arguments, name).float() for name in trained})
    output, gate_up, xa, ha = reference.moe_sft_fwd(arguments, "activations")
    mask = sum(1 << bit for bit, name in enumerate(GRADIENTS) if name in names)
    grad_output = inputs.grad_output[rows].float()
    grads = reference.moe_sft_bwd(grad_output, arguments, "activations", gate_up, xa, ha, mask)
    return output, {name: grad for name, grad in zip(GRADIENTS, grads, strict=True) if grad is not None}


def check_forward(
    layer: Layer, variant: Variant, inputs: Inputs, output: Tensor, factor: float = 1.0
) -> float:
    """Returns the largest relative error of the compared rows.

    Raises:
        WrongResult: it exceeds factor times the budget, or some output is not finite.
    """
    budget = factor * forward_budget(layer.dtype)
    rows = _rows(output.shape[0])
    expected = reference.moe_fwd(_arguments(layer, variant, inputs, rows))
    if not output.isfinite().all():
        raise WrongResult("output is not finite")
    return max(
        _require(f"output[{row}]", relative_error(output[row], expected[i]), budget)
        for i, row in enumerate(rows.tolist())
    )


def check_training(
    layer: Layer,
    variant: Variant,
    inputs: Inputs,
    output: Tensor,
    grads: dict[str, Tensor],
    factor: float = 1.0,
) -> float:
    """Returns the largest relative error of output and gradients.

    Token gradients are compared for some rows, LoRA and weight gradients for one expert.

    Args:
        grads: gradients by the names of ktops.ops.arguments.GRADIENTS.
        factor: multiplies the budget.

    Raises:
        WrongResult: one exceeds its budget, is not finite, or is not zero for an expert without tokens.
    """
    worst = check_forward(layer, variant, inputs, output, factor)
    budget = factor * gradient_budget(layer.dtype)
    for name, grad in grads.items():
        if not grad.isfinite().all():
            raise WrongResult(f"grad of {name} is not finite")

    rows = _rows(output.shape[0])
    expected_output, expected = _gradients(layer, variant, inputs, rows, {"hidden_states", "topk_weights"})
    actual, few = grads["topk_weights"][rows], safety(rows.numel() * layer.shape.top_k) / SAFETY
    if variant.experts.reduce:
        error = _topk_weights_error(inputs, rows, actual, expected["topk_weights"], expected_output)
    else:
        error = relative_error(actual, expected["topk_weights"])
    worst = max(worst, _require("grad of topk_weights", error, budget * few))
    for i, row in enumerate(rows.tolist()):
        error = relative_error(grads["hidden_states"][row], expected["hidden_states"][i])
        worst = max(worst, _require(f"grad of hidden_states[{row}]", error, budget))
    names = set(layer.adapters(variant.rank, variant.experts))
    names |= set(layer.weights(variant.experts)) if variant.full else set()
    return max(worst, _check_experts(layer, variant, inputs, grads, names, budget)) if names else worst


def _topk_weights_error(
    inputs: Inputs, rows: Tensor, actual: Tensor, expected: Tensor, output: Tensor
) -> float:
    """Returns the relative error of some of grad_w = <grad_output, y>.

    These are sums of H products of random sign that may cancel, so the error is relative to the usual size of
    such a sum if that is larger.
    """
    grad_output, weights = inputs.grad_output[rows].float(), inputs.topk_weights[rows].float()
    y = output.norm(dim=1) / weights.norm(dim=1)
    usual = (grad_output.norm(dim=1) * y / output.shape[1] ** 0.5).norm()
    error = relative_error(actual, expected)
    return error * min(1.0, (expected.norm() / usual).item())


def _check_experts(
    layer: Layer, variant: Variant, inputs: Inputs, grads: dict[str, Tensor], names: set[str], budget: float
) -> float:
    """Checks the gradients of the expert with the median number of tokens, and of one without any."""
    counts = inputs.topk_ids.flatten().bincount(minlength=layer.shape.num_experts)
    routed = counts.nonzero().flatten()
    expert = int(routed[counts[routed].argsort()[len(routed) // 2]])
    rows = (inputs.topk_ids == expert).any(dim=1).nonzero().flatten()
    _, expected = _gradients(layer, variant, inputs, rows, names, expert)
    idle = (counts == 0).nonzero().flatten()[:1]
    for name in names:
        if grads[name][idle].count_nonzero():
            raise WrongResult(f"grad of {name}[{int(idle)}] is not zero, but the expert has no tokens")
    worst = 0.0
    for name in sorted(names):
        error = relative_error(grads[name][expert], expected[name][0])
        worst = max(worst, _require(f"grad of {name}[{expert}]", error, budget))
    return worst
