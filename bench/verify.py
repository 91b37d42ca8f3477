"""Is a timed result right? Compared with ktops.reference in float32 on some tokens and some experts.

Tokens are compared row by row; the gradients of an expert's adapters need all tokens of that expert. The
budgets are those of ktops.testing; a dropped expert, a wrong weight or a wrong scale lies far above.
"""

import torch
from torch import Tensor

from bench.layer import Inputs, Layer
from ktops import reference
from ktops.ops.moe_sft import GRADIENTS
from ktops.testing.budgets import SAFETY, forward_budget, gradient_budget, relative_error, safety

_ROWS = 4
_SCALING = 1.0


class WrongResult(Exception):
    """A timed call returned something else than the reference."""


def _require(name: str, error: float, budget: float) -> float:
    if not error <= budget:
        raise WrongResult(f"{name} is wrong: relative error {error:.3g}, allowed {budget:.3g}")
    return error


def _arguments(layer: Layer, rank: int, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple:
    lora = [None] * 4 if rank == 0 else [t.detach().float() for t in layer.adapters(rank).values()]
    return (
        x.float(), topk_ids, topk_weights.float(), layer.gate_up_proj, layer.down_proj,
        None, None, None, None, None, None, *lora,
        layer.shape.num_experts, layer.shape.intermediate_size, "dense", 0, _SCALING, _SCALING, "silu", [],
    )  # fmt: skip


def _rows(tokens: int) -> Tensor:
    """The first token, the last and some between."""
    return torch.linspace(0, tokens - 1, min(tokens, _ROWS)).round().long().unique()


def _gradients(layer: Layer, rank: int, inputs: Inputs, rows: Tensor, topk_ids: Tensor, names: set[str]):
    """(reference output of rows, {name: reference gradient}) for grad_output of those rows"""
    arguments = _arguments(layer, rank, inputs.hidden_states[rows], topk_ids, inputs.topk_weights[rows])
    saved = reference.moe_sft_fwd(*arguments, "activations")
    mask = sum(1 << bit for bit, name in enumerate(GRADIENTS) if name in names)
    grad_output = inputs.grad_output[rows].float()
    grads = reference.moe_sft_bwd(grad_output, *arguments, "activations", *saved[1:], mask)
    return saved[0], dict(zip(GRADIENTS, grads, strict=True))


def check_forward(layer: Layer, rank: int, inputs: Inputs, output: Tensor) -> float:
    """Largest relative error of the rows looked at.

    Raises:
        WrongResult: it exceeds the budget, or some output is not finite.
    """
    budget = forward_budget(layer.dtype)
    rows = _rows(output.shape[0])
    ids, weights = inputs.topk_ids[rows], inputs.topk_weights[rows]
    expected = reference.moe_fwd(*_arguments(layer, rank, inputs.hidden_states[rows], ids, weights))
    if not output.isfinite().all():
        raise WrongResult("output is not finite")
    return max(
        _require(f"output[{row}]", relative_error(output[row], expected[i]), budget)
        for i, row in enumerate(rows.tolist())
    )


def check_training(
    layer: Layer, rank: int, inputs: Inputs, output: Tensor, grads: dict[str, Tensor]
) -> float:
    """Largest relative error of output, token gradients (some rows) and LoRA gradients (one expert).

    Args:
        grads: by the names of ktops.ops.moe_sft.GRADIENTS.

    Raises:
        WrongResult: one exceeds its budget, is not finite, or is not zero for an expert without tokens.
    """
    worst = check_forward(layer, rank, inputs, output)
    budget = gradient_budget(layer.dtype)
    for name, grad in grads.items():
        if not grad.isfinite().all():
            raise WrongResult(f"grad of {name} is not finite")

    rows = _rows(output.shape[0])
    names = {"hidden_states", "topk_weights"}
    expected_output, expected = _gradients(layer, rank, inputs, rows, inputs.topk_ids[rows], names)
    error = _topk_weights_error(
        inputs, rows, grads["topk_weights"][rows], expected["topk_weights"], expected_output
    )
    few = safety(rows.numel() * layer.shape.top_k) / SAFETY
    worst = max(worst, _require("grad of topk_weights", error, budget * few))
    for i, row in enumerate(rows.tolist()):
        error = relative_error(grads["hidden_states"][row], expected["hidden_states"][i])
        worst = max(worst, _require(f"grad of hidden_states[{row}]", error, budget))
    return max(worst, _check_adapters(layer, rank, inputs, grads, budget)) if rank else worst


def _topk_weights_error(
    inputs: Inputs, rows: Tensor, actual: Tensor, expected: Tensor, output: Tensor
) -> float:
    """Relative error of some of grad_w = <grad_output, y>, sums of H products of random sign that may cancel.

    So it is relative to the usual size of such a sum, where that is larger.
    """
    grad_output, weights = inputs.grad_output[rows].float(), inputs.topk_weights[rows].float()
    y = output.norm(dim=1) / weights.norm(dim=1)
    usual = (grad_output.norm(dim=1) * y / output.shape[1] ** 0.5).norm()
    error = relative_error(actual, expected)
    return error * min(1.0, (expected.norm() / usual).item())


def _check_adapters(
    layer: Layer, rank: int, inputs: Inputs, grads: dict[str, Tensor], budget: float
) -> float:
    """The gradients of the expert with the median number of tokens, and of one without any."""
    names = set(layer.adapters(rank))
    counts = inputs.topk_ids.flatten().bincount(minlength=layer.shape.num_experts)
    routed = counts.nonzero().flatten()
    expert = int(routed[counts[routed].argsort()[len(routed) // 2]])
    rows = (inputs.topk_ids == expert).any(dim=1).nonzero().flatten()
    ids = inputs.topk_ids[rows]
    only = torch.where(ids == expert, ids, -1)
    _, expected = _gradients(layer, rank, inputs, rows, only, names)
    idle = (counts == 0).nonzero().flatten()[:1]
    for name in names:
        if grads[name][idle].count_nonzero():
            raise WrongResult(f"grad of {name}[{int(idle)}] is not zero, but the expert has no tokens")
    worst = 0.0
    for name in sorted(names):
        error = relative_error(grads[name][expert], expected[name][expert])
        worst = max(worst, _require(f"grad of {name}[{expert}]", error, budget))
    return worst
