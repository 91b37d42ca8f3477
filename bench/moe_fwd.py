"""kt::moe_fwd: ktops.moe_sft without a tensor that requires a gradient."""

import torch
from torch import Tensor

import ktops
from bench.layer import Inputs, Layer, Variant
from bench.roofline import forward_work as work  # noqa: F401

MODE = "forward"


def call(layer: Layer, variant: Variant, inputs: Inputs) -> Tensor:
    """Runs the timed call; returns the output."""
    with torch.no_grad():
        return ktops.moe_sft(
            inputs.hidden_states,
            inputs.topk_ids,
            inputs.topk_weights,
            **layer.weights(variant.experts),
            **layer.adapters(variant.rank, variant.experts),
            **variant.experts.options,
        )


def check(layer: Layer, variant: Variant, inputs: Inputs, result: Tensor, factor: float = 1.0) -> float:
    """Returns the largest relative error; raises bench.verify.WrongResult above factor times the budget."""
    from bench.verify import check_forward  # needs this tree's ktops; calls are timed with others too

    return check_forward(layer, variant, inputs, result, factor)
