"""LoRA on the experts, written by hand as a loop over the experts with tokens; backward by autograd."""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from bench.layer import Inputs, Layer
from bench.peers.autograd import LoraContestant


class Contestant(LoraContestant):
    """Unbinds the adapters once, so that their gradients are stacked once."""

    def __init__(self, layer: Layer, rank: int) -> None:
        super().__init__(layer, rank)
        self.layer = layer

    def output(self, x: Tensor, topk_weights: Tensor, adapters: dict[str, Tensor], inputs: Inputs) -> Tensor:
        lora = [adapter.unbind() for adapter in adapters.values()]
        order = inputs.topk_ids.flatten().argsort(stable=True)
        counts = inputs.topk_ids.flatten().bincount(minlength=self.layer.shape.num_experts).tolist()
        top_k = inputs.topk_ids.shape[1]
        out, flat_weights = torch.zeros_like(x), topk_weights.reshape(-1)
        for expert, routes in enumerate(order.split(counts)):
            if routes.numel() == 0:
                continue
            a1, b1, a2, b2 = (stack[expert] for stack in lora)
            tokens = routes // top_k
            rows = x[tokens]
            gate_up = linear(rows, self.layer.gate_up_proj[expert]) + linear(linear(rows, a1), b1)
            gate, up = gate_up.chunk(2, dim=1)
            h = silu(gate) * up
            y = linear(h, self.layer.down_proj[expert]) + linear(linear(h, a2), b2)
            out.index_add_(0, tokens, y * flat_weights[routes, None])
        return out
