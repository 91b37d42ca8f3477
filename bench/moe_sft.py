"""kt::moe_sft_fwd and kt::moe_sft_bwd: forward and backward through autograd."""

import torch
from torch import Tensor

import ktops
from bench.layer import Inputs, Layer, Variant
from bench.roofline import training_work as work  # noqa: F401

MODE = "training"


def call(layer: Layer, variant: Variant, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs the timed call; returns the output and, by name, the gradients of inputs and trained tensors."""
    adapters = layer.adapters(variant.rank, variant.experts)
    leaves = {
        "hidden_states": inputs.hidden_states.detach().requires_grad_(),
        "topk_weights": inputs.topk_weights.detach().requires_grad_(),
        **adapters,
    }
    weights = layer.weights(variant.experts)
    if variant.full:
        weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        leaves |= weights
    output = ktops.moe_sft(
        leaves["hidden_states"],
        inputs.topk_ids,
        leaves["topk_weights"],
        **weights,
        **adapters,
        **variant.experts.options,
        save=variant.save,
    )
    grads = torch.autograd.grad(output, list(leaves.values()), inputs.grad_output)
    return output.detach(), dict(zip(leaves, grads, strict=True))


def check(
    layer: Layer,
    variant: Variant,
    inputs: Inputs,
    result: tuple[Tensor, dict[str, Tensor]],
    factor: float = 1.0,
) -> float:
    """Returns the largest relative error; raises bench.verify.WrongResult above factor times the budget."""
    from bench.verify import check_training  # needs this tree's ktops; calls are timed with others too

    return check_training(layer, variant, inputs, *result, factor)
