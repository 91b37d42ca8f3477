"""Trains with KTransformers' fork of LLaMA-Factory, but without kt_kernel, in plain PyTorch.

Arguments: a folder with the adapters that experts begin with, the file to write the trained ones to, and what
``llamafactory-cli train`` takes, with use_kt: false.
"""

import json
import sys
from pathlib import Path

import torch
from llamafactory.model import loader
from llamafactory.train.tuner import run_exp
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FACTORS = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


class Adapted(nn.Module):
    """Experts of transformers with adapters, computed one expert after the other.

    The adapters are disabled together with those of ``peft_layer``.
    """

    def __init__(
        self, experts: nn.Module, factors: dict[str, Tensor], scaling: float, peft_layer: BaseTunerLayer
    ) -> None:
        super().__init__()
        self.experts, self.scaling = experts, scaling
        self.others = (peft_layer,)
        self.factors = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in factors.items()})

    def weight(self, weight: Tensor, projection: str, expert: int) -> Tensor:
        if self.others[0].disable_adapters:
            return weight
        a, b = (self.factors[f"{projection}_lora_{factor}"][expert] for factor in "ab")
        return weight + self.scaling * b @ a

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in range(len(self.experts.down_proj)):
            gate, up = self.experts.gate_up_proj[expert].chunk(2)
            token, slot = (top_k_index == expert).nonzero(as_tuple=True)
            x = hidden_states[token]
            hidden = nn.functional.silu(x @ self.weight(gate, "gate", expert).T)
            hidden = hidden * (x @ self.weight(up, "up", expert).T)
            result = hidden @ self.weight(self.experts.down_proj[expert], "down", expert).T
            output = output.index_add(0, token, top_k_weights[token, slot, None] * result)
        return output


def main() -> None:
    start, trained = Path(sys.argv.pop(1)), Path(sys.argv.pop(1))
    config = json.loads((start / "adapter_config.json").read_text())
    tensors = load_file(start / "fused_expert_lora.safetensors")
    init_adapter, adapted = loader.init_adapter, {}

    def with_experts(*args, **kwargs) -> nn.Module:
        model = init_adapter(*args, **kwargs)
        peft_layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
        for name, block in list(model.named_modules()):
            if isinstance(getattr(block, "experts", None), nn.Module) and not isinstance(block, Adapted):
                prefix = f"layers.{name.split('.layers.')[1].split('.')[0]}.experts"
                factors = {factor: tensors[f"{prefix}.{factor}"] for factor in FACTORS}
                scaling = config["lora_alpha"] / config["r"]
                block.experts = Adapted(block.experts, factors, scaling, peft_layer)
                adapted[prefix] = block.experts.factors
        return model

    loader.init_adapter = with_experts
    run_exp()
    factors = {
        f"{prefix}.{name}": tensor for prefix, found in adapted.items() for name, tensor in found.items()
    }
    save_file({name: tensor.detach() for name, tensor in factors.items()}, trained)


main()
