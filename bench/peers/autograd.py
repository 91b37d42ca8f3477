"""Shared code of contestants that train through autograd."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from bench.layer import Inputs, Layer


def gradients(output: Tensor, leaves: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Returns {name: gradient} of <output, grad_output>."""
    grads = torch.autograd.grad(output, list(leaves.values()), inputs.grad_output)
    return dict(zip(leaves, grads, strict=True))


class LoraContestant(ABC):
    """Training of a layer whose output is a differentiable function of x, weights and adapters."""

    def __init__(self, layer: Layer, rank: int) -> None:
        self.adapters = layer.adapters(rank)

    @abstractmethod
    def output(self, x: Tensor, topk_weights: Tensor, adapters: dict[str, Tensor], inputs: Inputs) -> Tensor:
        """[T, H]"""

    def training(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the output and the gradients by the names of ktops.ops.arguments.GRADIENTS."""
        leaves = {
            "hidden_states": inputs.hidden_states.detach().requires_grad_(),
            "topk_weights": inputs.topk_weights.detach().requires_grad_(),
            **self.adapters,
        }
        output = self.output(leaves["hidden_states"], leaves["topk_weights"], self.adapters, inputs)
        return output.detach(), gradients(output, leaves, inputs)
