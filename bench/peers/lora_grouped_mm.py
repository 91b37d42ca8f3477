"""LoRA on the experts, written by hand with torch.nn.functional.grouped_mm over sorted routes."""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from bench.layer import Inputs, Layer
from bench.peers.autograd import LoraContestant


def _lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Maps x [R, in] of routes sorted by expert to [R, out]."""
    low_rank = grouped_mm(x, a.transpose(1, 2), offs=offsets)
    return grouped_mm(x, weight.transpose(1, 2), offs=offsets) + grouped_mm(
        low_rank, b.transpose(1, 2), offs=offsets
    )


class Contestant(LoraContestant):
    """Six grouped products in forward; backward by autograd."""

    def __init__(self, layer: Layer, rank: int) -> None:
        super().__init__(layer, rank)
        self.layer = layer

    def output(self, x: Tensor, topk_weights: Tensor, adapters: dict[str, Tensor], inputs: Inputs) -> Tensor:
        tokens, top_k = inputs.topk_ids.shape
        ids, order = inputs.topk_ids.flatten().sort(stable=True)
        offsets = ids.bincount(minlength=self.layer.shape.num_experts).cumsum(0).to(torch.int32)
        a1, b1, a2, b2 = adapters.values()
        gate_up = _lora_linear(x[order // top_k], self.layer.gate_up_proj, a1, b1, offsets)
        gate, up = gate_up.chunk(2, dim=1)
        y = _lora_linear(silu(gate) * up, self.layer.down_proj, a2, b2, offsets)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel())
        y = (y * topk_weights.reshape(-1)[order, None])[inverse]
        return y.view(tokens, top_k, -1).sum(1)
