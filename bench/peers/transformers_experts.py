"""The experts of transformers, as run by ``from_pretrained(..., experts_implementation=...)``."""

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from bench.layer import Inputs, Layer


def experts(layer: Layer, implementation: str) -> Qwen3MoeExperts:
    """Returns the experts module of transformers on the weights of the layer, not copied."""
    config = Qwen3MoeConfig(
        hidden_size=layer.shape.hidden_size,
        moe_intermediate_size=layer.shape.intermediate_size,
        num_experts=layer.shape.num_experts,
        num_experts_per_tok=layer.shape.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(layer.gate_up_proj, requires_grad=False)
    module.down_proj = torch.nn.Parameter(layer.down_proj, requires_grad=False)
    return module


class Contestant:
    """Provides forward only; implementation is "eager" or "grouped_mm"."""

    def __init__(self, layer: Layer, rank: int, implementation: str) -> None:
        self.module = experts(layer, implementation)

    def forward(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return self.module(inputs.hidden_states, inputs.topk_ids, inputs.topk_weights)
