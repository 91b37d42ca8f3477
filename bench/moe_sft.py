"""kt::moe_sft_fwd and kt::moe_sft_bwd: forward and backward through autograd, base weights frozen."""

import torch
from torch import Tensor

import ktops
from bench.layer import Inputs, Layer
from bench.roofline import training_work as work  # noqa: F401
from bench.verify import check_training

MODE = "training"


def call(layer: Layer, rank: int, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The timed call: output and the gradients of hidden_states, topk_weights and the adapters, by name."""
    leaves = {
        "hidden_states": inputs.hidden_states.detach().requires_grad_(),
        "topk_weights": inputs.topk_weights.detach().requires_grad_(),
        **layer.adapters(rank),
    }
    output = ktops.moe_sft(
        leaves["hidden_states"],
        inputs.topk_ids,
        leaves["topk_weights"],
        layer.gate_up_proj,
        layer.down_proj,
        **layer.adapters(rank),
    )
    grads = torch.autograd.grad(output, list(leaves.values()), inputs.grad_output)
    return output.detach(), dict(zip(leaves, grads, strict=True))


def check(layer: Layer, rank: int, inputs: Inputs, result: tuple[Tensor, dict[str, Tensor]]) -> float:
    """Largest relative error; raises bench.verify.WrongResult."""
    return check_training(layer, rank, inputs, *result)
