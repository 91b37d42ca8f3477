"""Runs the tiny models of every_model, through ktops and with adapters on their experts."""

import peft
import torch
from every_model import tiny_batch, tiny_model
from model_runs import CountOps, Run
from model_support import SWAPPED
from peft_models import randomize

import ktops
from ktops.integrations.peft import expert_target_parameters


def through_ktops(folder: str, model: torch.nn.Module) -> torch.nn.Module:
    """Makes the experts of a model of this folder, with or without adapters, run the op."""
    if folder in SWAPPED:
        assert ktops.swap_experts(model)
    else:
        getattr(model, "base_model", model).set_experts_implementation("ktops")
    return model


def step(model: torch.nn.Module, folder: str, batch: dict[str, torch.Tensor] | None = None) -> Run:
    """Runs forward and backward; parameters that the batch does not reach have no gradient."""
    with CountOps() as ops:
        output = model(**(tiny_batch(folder) if batch is None else batch))
        loss = getattr(output, "loss", None)
        if loss is None:
            loss = output.logits.square().mean()
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    aux_loss = getattr(output, "aux_loss", None)
    return Run(output.logits.detach(), loss.detach(), aux_loss, gradients, ops.counts)


def with_adapters(
    folder: str, dtype: torch.dtype = torch.float32, adapters: tuple[str, ...] = ("default",), seed: int = 2
) -> peft.PeftModel:
    """Returns the model with random LoRA on its experts, and nothing else to train; the first is active."""
    model = tiny_model(folder, dtype)
    targets = expert_target_parameters(model)
    assert targets
    config = peft.LoraConfig(r=2, lora_alpha=3, target_parameters=targets)
    first, *more = adapters
    model = peft.get_peft_model(model, config, adapter_name=first)
    for name in more:
        model.add_adapter(name, config)
    randomize(model, seed)
    return model
