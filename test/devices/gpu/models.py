"""Whole small models with everything but their experts on the device."""

import tempfile

import torch
from gpu.checks import check
from gpu.runtime import Runtime
from model_runs import MODEL_BUDGET
from peft_models import adapted, loss_and_gradients
from test_trainer import losses, trainer
from tiny_models import tiny_batch, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import ktops
from ktops.testing.budgets import relative_error

ARCHITECTURES = ("qwen3_moe", "deepseek_v3")


def model_of(architecture: str, **overrides) -> nn.Module:
    return tiny_model(architecture, experts_implementation="ktops", **overrides).eval()


def on(device: torch.device, batch: dict) -> dict:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def require_experts_on_the_cpu(runtime: Runtime, model: nn.Module) -> None:
    assert model.device == runtime.device
    for name, parameter in model.named_parameters():
        routed = ".experts." in name
        assert parameter.is_cpu == routed, f"{name} is on {parameter.device}"


@torch.no_grad()
def require_close_logits(model: nn.Module, expected: torch.Tensor) -> None:
    logits = model(**on(model.device, tiny_batch())).logits
    error = relative_error(logits.cpu(), expected)
    assert error < MODEL_BUDGET, f"logits: relative error {error:.1e}"


@check("models: training with PEFT, loss and gradients of the CPU", "tensors")
def trains(runtime: Runtime) -> None:
    for architecture in ARCHITECTURES:
        model = adapted(architecture)
        expected = {name: value.clone() for name, value in loss_and_gradients(model).items()}
        ktops.offload_experts(model, runtime.device)
        require_experts_on_the_cpu(runtime, model)
        actual = loss_and_gradients(model, on(runtime.device, tiny_batch()))
        for name, value in expected.items():
            error = relative_error(actual[name].cpu(), value)
            assert error < MODEL_BUDGET, f"{architecture}, {name}: relative error {error:.1e}"


@check("models: generation with a cache", "tensors")
@torch.no_grad()
def generates(runtime: Runtime) -> None:
    for architecture in ARCHITECTURES:
        model, on_cpu = (model_of(architecture, eos_token_id=None) for _ in range(2))
        ktops.offload_experts(model, runtime.device)
        prompt = tiny_batch()["input_ids"]
        tokens = model.generate(
            prompt.to(runtime.device),
            attention_mask=torch.ones_like(prompt).to(runtime.device),
            max_new_tokens=8,
            do_sample=False,
        ).cpu()
        logits = on_cpu(tokens[:, :-1]).logits[:, prompt.shape[1] - 1 :]
        chosen = logits.gather(2, tokens[:, prompt.shape[1] :, None])[..., 0]
        behind = (logits.amax(2) - chosen).max().item()
        assert behind <= MODEL_BUDGET * logits.abs().max().item(), f"{architecture}: {behind:.1e} behind"


@check("models: Trainer", "tensors")
def trainer_steps(runtime: Runtime) -> None:
    model = adapted("qwen3_moe")
    ktops.offload_experts(model, runtime.device)
    with tempfile.TemporaryDirectory() as folder:
        pins = runtime.device.type == "cuda"
        run = trainer(folder, model, use_cpu=False, max_steps=8, dataloader_pin_memory=pins)
        run.train()
    require_experts_on_the_cpu(runtime, model)
    history = losses(run)
    assert len(history) == 8 and sum(history[-4:]) < sum(history[:4]), history


@check("models: from_pretrained with device_map", "tensors")
def device_map(runtime: Runtime) -> None:
    for architecture in ARCHITECTURES:
        model = model_of(architecture)
        with torch.no_grad():
            expected = model(**tiny_batch()).logits
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                experts_implementation="ktops",
                device_map=str(runtime.device),
                quantization_config=ktops.KTConfig(),
            )
        require_experts_on_the_cpu(runtime, loaded)
        require_close_logits(loaded, expected)


@check("models: some experts on the device", "tensors")
def experts_on_the_device(runtime: Runtime) -> None:
    model = model_of("qwen3_moe")
    with torch.no_grad():
        expected = model(**tiny_batch()).logits
    ktops.offload_experts(model, runtime.device, num_gpu_experts=2)
    require_close_logits(model, expected)


@check("models: many tokens", "tensors")
def streamed(runtime: Runtime) -> None:
    model = model_of("qwen3_moe")
    with torch.no_grad():
        expected = model(**tiny_batch()).logits
    ktops.offload_experts(model, runtime.device)
    ktops.stream_experts(model, 1)
    require_close_logits(model, expected)
