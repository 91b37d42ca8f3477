"""Inputs on the simulated device, and the same on the CPU."""

import pytest

from ktops.testing import simulated_device
from ktops.testing.inputs import moe_inputs

simulated_device.register()

TOKENS = ("hidden_states", "topk_ids", "topk_weights")
SIZES = {"T": 5, "H": 64, "I": 32, "E": 4, "K": 2}


@pytest.fixture
def device():
    return simulated_device.device()


def inputs(**options) -> dict:
    """Returns arguments of ``ktops.moe_sft`` on the CPU."""
    return moe_inputs(**{**SIZES, "lora_rank": (3, 5), "bias": True, **options})


def on_device(given: dict, *names: str) -> dict:
    """Returns the same arguments with tokens and routes, and the tensors of these names, on the device."""
    moved = {name: given[name].detach().to(simulated_device.device()) for name in (*TOKENS, *names)}
    return {name: moved.get(name, value) for name, value in given.items()}
