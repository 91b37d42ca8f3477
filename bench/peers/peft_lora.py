"""PEFT's own path: ``LoraConfig(target_parameters=...)`` on the experts of transformers."""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bench.layer import Inputs, Layer
from bench.peers.autograd import gradients
from bench.peers.transformers_experts import experts


class _Block(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.experts = experts(layer, "grouped_mm")

    def forward(self, *args: Tensor) -> Tensor:
        return self.experts(*args)


def _to_peft(name: str, factor: Tensor) -> Tensor:
    """Reshapes A [E, r, in] to [E * r, in], expert outermost; B [E, out, r] to [out, r * E], innermost."""
    if name.endswith("_A"):
        return factor.reshape(-1, factor.shape[-1])
    return factor.permute(1, 2, 0).reshape(factor.shape[1], -1)


def _from_peft(name: str, factor: Tensor, num_experts: int) -> Tensor:
    if name.endswith("_A"):
        return factor.reshape(num_experts, -1, factor.shape[-1])
    return factor.reshape(factor.shape[0], -1, num_experts).permute(2, 0, 1)


class Contestant:
    """Trains PEFT's own adapters, which are float32 parameters."""

    def __init__(self, layer: Layer, rank: int) -> None:
        self.num_experts = layer.shape.num_experts
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        config = LoraConfig(r=rank, lora_alpha=rank, target_parameters=targets, target_modules=[])
        self.model = get_peft_model(_Block(layer), config)
        self.adapters: dict[str, nn.Parameter] = {}
        for module in self.model.modules():
            if hasattr(module, "parameter_name") and hasattr(module, "lora_A"):
                prefix = module.parameter_name.removesuffix("_proj")
                self.adapters[f"{prefix}_lora_A"] = module.lora_A["default"].weight
                self.adapters[f"{prefix}_lora_B"] = module.lora_B["default"].weight
        with torch.no_grad():
            for name, factor in layer.adapters(rank).items():
                self.adapters[name].copy_(_to_peft(name, factor))

    def training(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the output and the gradients by the names of ktops.ops.arguments.GRADIENTS."""
        leaves = {
            "hidden_states": inputs.hidden_states.detach().requires_grad_(),
            "topk_weights": inputs.topk_weights.detach().requires_grad_(),
            **self.adapters,
        }
        output = self.model(leaves["hidden_states"], inputs.topk_ids, leaves["topk_weights"])
        grads = gradients(output, leaves, inputs)
        for name in self.adapters:
            grads[name] = _from_peft(name, grads[name], self.num_experts)
        return output.detach(), grads
