"""kt::moe_fwd: ktops.moe_sft without a tensor that requires a gradient."""

import torch
from torch import Tensor

import ktops
from bench.layer import Inputs, Layer
from bench.roofline import forward_work as work  # noqa: F401
from bench.verify import check_forward

MODE = "forward"


def call(layer: Layer, rank: int, inputs: Inputs) -> Tensor:
    """The timed call: output [T, H]."""
    with torch.no_grad():
        return ktops.moe_sft(
            inputs.hidden_states,
            inputs.topk_ids,
            inputs.topk_weights,
            layer.gate_up_proj,
            layer.down_proj,
            **layer.adapters(rank),
        )


def check(layer: Layer, rank: int, inputs: Inputs, result: Tensor) -> float:
    """Largest relative error; raises bench.verify.WrongResult."""
    return check_forward(layer, rank, inputs, result)
