"""Tiny wrapped models with adapters of PEFT, for the functions of kt_kernel.sft that trainers call."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_batch, tiny_model
from torch import nn

from ktops.compat.kt_kernel.sft import KTConfig, kt_adapt_peft_lora, wrap_moe_layers_with_kt_wrapper

RANK, ALPHA = 2, 6.0
CONFIG = KTConfig(kt_lora_rank=RANK, kt_lora_alpha=ALPHA)


def wrapped(config: KTConfig | object = CONFIG, architecture: str = "qwen3_moe") -> nn.Module:
    """Returns a tiny wrapped model without any adapters."""
    model = tiny_model(architecture).eval()
    wrap_moe_layers_with_kt_wrapper(model, config)
    return model


def adapted(config: KTConfig = CONFIG, architecture: str = "qwen3_moe", seed: int = 1) -> PeftModel:
    """Returns a tiny wrapped model with random adapters, PEFT's on o_proj and those of the experts."""
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["o_proj"])
    model = get_peft_model(wrapped(config, architecture), lora)
    kt_adapt_peft_lora(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tiny_batch()["input_ids"]).logits


def backward(model: nn.Module) -> None:
    model(**tiny_batch()).loss.backward()
