"""zentorch's fused_moe, which repacks its weights in place in the first call."""

import torch
import zentorch  # noqa: F401  (registers the operator)
from torch import Tensor

from bench.layer import Inputs, Layer


class Contestant:
    """Provides forward only. The layer's weights are unreadable afterward."""

    def __init__(self, layer: Layer, rank: int) -> None:
        self.w13, self.w2 = layer.gate_up_proj, layer.down_proj

    def forward(self, inputs: Inputs) -> Tensor:
        output = torch.empty_like(inputs.hidden_states)
        weights, ids = inputs.topk_weights.float(), inputs.topk_ids.to(torch.int32)
        with torch.no_grad():
            torch.ops.zentorch.zentorch_fused_moe(
                output, inputs.hidden_states, self.w13, self.w2, None, None, weights, ids, False, "silu"
            )
        return output
