"""Whole tiny models on the simulated device, their experts in CPU memory, and the same models on the CPU."""

import every_model
import torch
from model_runs import MODEL_BUDGET
from model_support import SWAPPED
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import randomize
from torch import nn

import ktops
from ktops.integrations.peft import expert_target_parameters
from ktops.testing import simulated_device
from ktops.testing.budgets import relative_error

CPU = torch.device("cpu")


def model_on_cpu(folder: str, **overrides) -> nn.Module:
    """Returns a tiny model in training mode whose experts run through ktops."""
    model = every_model.tiny_model(folder, attn_implementation="eager", **overrides)
    if folder in SWAPPED:
        ktops.swap_experts(model)
    else:
        model.set_experts_implementation("ktops")
    return model


def with_adapters(model: nn.Module) -> PeftModel:
    """Adds random LoRA of rank 4 on o_proj and the experts."""
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["o_proj"], target_parameters=expert_target_parameters(model)
    )
    model = get_peft_model(model, config)
    randomize(model)
    return model


def batch(folder: str, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in every_model.tiny_batch(folder).items()}


def loss_and_gradients(model: nn.Module, folder: str) -> dict[str, torch.Tensor]:
    """Returns {"loss": ..., parameter: gradient} of a step on the model's device, as tensors on the CPU."""
    loss = model(**batch(folder, model.device)).loss
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name: tensor.detach().cpu() for name, tensor in ({"loss": loss} | named).items()}
    model.zero_grad(set_to_none=True)
    return found


def require_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys() and len(actual) > 1
    for name, value in expected.items():
        assert relative_error(actual[name], value) < MODEL_BUDGET, name


@torch.no_grad()
def logits(model: nn.Module, folder: str) -> torch.Tensor:
    """Returns logits, computed on the model's device, on the CPU."""
    return model(**batch(folder, model.device)).logits.cpu()


def on_cpu(model: nn.Module) -> set[str]:
    """Returns the names of the Parameters and buffers in CPU memory; the others are on the device."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert {tensor.device for tensor in tensors.values()} <= {CPU, simulated_device.device()}
    return {name for name, tensor in tensors.items() if tensor.device == CPU}
