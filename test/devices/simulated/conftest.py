"""Inputs on the simulated device, and the same on the CPU."""

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch.utils._python_dispatch import TorchDispatchMode

from ktops.ops.check_devices import TOKENS
from ktops.testing import simulated_device
from ktops.testing.inputs import moe_inputs

simulated_device.register()

SIZES = {"T": 5, "H": 64, "I": 32, "E": 4, "K": 2}


@pytest.fixture
def device():
    return simulated_device.device()


@pytest.fixture
def trainers_use(monkeypatch):
    """``trainers_use(device)`` has the next Trainer choose a device."""

    def forget():
        AcceleratorState._reset_state()
        PartialState._reset_state()

    def use(device) -> None:
        forget()
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(device))

    yield use
    forget()


class Calls(TorchDispatchMode):
    """Records the names of the kt operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kt":
            self.names.append(func._schema.name.removeprefix("kt::"))
        return func(*args, **(kwargs or {}))


def inputs(**options) -> dict:
    """Returns arguments of ``ktops.moe_sft`` on the CPU."""
    return moe_inputs(**{**SIZES, "lora_rank": (3, 5), "bias": True, **options})


def on_device(given: dict, *names: str) -> dict:
    """Returns the same arguments with tokens and routes, and the tensors of these names, on the device."""
    moved = {name: given[name].detach().to(simulated_device.device()) for name in (*TOKENS, *names)}
    return {name: moved.get(name, value) for name, value in given.items()}


def fake(x):
    """Returns a fake tensor, not of the simulated device's own class; to be called in a FakeTensorMode."""
    if not torch.is_tensor(x):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
