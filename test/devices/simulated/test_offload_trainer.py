"""The Hugging Face Trainer with a model on the device and its experts in CPU memory."""

import pytest
import torch
from peft_models import adapted
from simulated.offloaded import on_cpu
from test_trainer import adapters, losses, trainer

import ktops
from ktops.testing.budgets import gradient_budget, relative_error

pytestmark = pytest.mark.usefixtures("enabled", "single_thread")


@pytest.fixture
def train(tmp_path, trainers_use):
    """``train(model, device)`` trains for three steps on a device; returns the Trainer."""

    def train(model, device: torch.device):
        trainers_use(device)
        options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "dataloader_pin_memory": False}
        run = trainer(tmp_path / device.type, model, use_cpu=device.type == "cpu", **options)
        assert run.args.device == device
        run.train()
        return run

    return train


def test_trains_as_on_the_cpu(device, train, tmp_path):
    models = adapted("qwen3_moe"), adapted("qwen3_moe")
    for model in models:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = train(models[0], torch.device("cpu"))
    ktops.offload_experts(models[1], device)
    staying = on_cpu(models[1])
    actual = train(models[1], device)
    assert on_cpu(models[1]) == staying and any("lora" in name for name in staying)
    budget = gradient_budget(torch.float32, inner_size=64)
    assert len(losses(actual)) == 3 and losses(actual) == pytest.approx(losses(expected), rel=budget)
    for name, value in adapters(expected).items():
        assert relative_error(adapters(actual)[name].cpu(), value) < 3 * budget, name
    for checkpoint in (tmp_path / kind / "checkpoint-2" for kind in (device.type, "cpu")):
        assert (checkpoint / "adapter_model.safetensors").is_file()
