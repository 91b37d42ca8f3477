"""Inputs of layers, in CPU memory and with tokens and routes on the device."""

import functools

import torch
from gpu.runtime import Runtime

from ktops.ops.check_devices import TOKENS
from ktops.testing.inputs import moe_inputs

SMALL = {"T": 33, "H": 64, "I": 32, "E": 4, "K": 2}


def small(**options) -> dict:
    """Returns arguments of ``ktops.moe_sft`` in CPU memory."""
    return moe_inputs(**{**SMALL, **options})


def on_device(given: dict, device: torch.device, *names: str) -> dict:
    """Returns the same with copies of the tokens, the routes and the tensors of these names on the device."""
    moved = {name: given[name].to(device, copy=True) for name in (*TOKENS, *names)}
    return {name: moved.get(name, value) for name, value in given.items()}


@functools.cache
def _layer(**sizes: int) -> dict:
    return moe_inputs(T=1, dtype=torch.bfloat16, **sizes)


def layer(runtime: Runtime, num_tokens: int) -> dict:
    """Returns arguments of the layer that is measured, bfloat16; its weights are made once."""
    sizes = runtime.sizes.layer
    tokens = moe_inputs(T=num_tokens, dtype=torch.bfloat16, **{**sizes, "I": 1})
    return _layer(**sizes) | {name: tokens[name] for name in TOKENS}
