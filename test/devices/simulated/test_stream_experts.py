"""Many tokens: the experts are copied to the device in pieces and multiplied there."""

import gc
import re
import weakref
from contextlib import contextmanager

import pytest
import torch
from simulated.conftest import TOKENS, inputs, on_device

import ktops
from ktops import reference
from ktops.devices import grouped
from ktops.ops.check_devices import LORA
from ktops.testing import simulated_device
from ktops.testing.activations import ACTIVATION_CASES, away_from_kinks
from ktops.testing.budgets import forward_budget, relative_error
from ktops.testing.compare import assert_matches_reference
from ktops.testing.inputs import densified, op_arguments, require_grad, upcast
from ktops.testing.simulated_device import SimulatedTensor, traffic
from ktops.testing.weights import random_weight, variants

pytestmark = pytest.mark.usefixtures("single_thread")

SIZES = {"T": 12, "H": 64, "I": 32, "E": 6, "K": 2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WEIGHTS = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")


def many(**options) -> dict:
    return inputs(**{**SIZES, **options})


def streamed(given: dict, piece_bytes: int, *names: str) -> torch.Tensor:
    """Runs the operator with tokens, routes and the named tensors on the device; returns a CPU tensor."""
    arguments = op_arguments(on_device(given, *names))
    output = torch.ops.kt.moe_fwd_streamed(*arguments, piece_bytes)
    assert output.device == arguments.hidden_states.device
    return output.cpu()


def check(given: dict, piece_bytes: int, *names: str) -> None:
    expected = reference.moe_fwd(op_arguments(upcast(densified(given))))
    dtype, size = given["hidden_states"].dtype, max(given["down_proj"].shape[1:])
    assert relative_error(streamed(given, piece_bytes, *names), expected) <= forward_budget(dtype, size)


PIECES = [1, 60_000, 1 << 30]
"""Bytes of pieces: one expert and one row at a time, several of each, and everything at once."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense(device, dtype):
    given = many(dtype=dtype)
    grad_output = torch.zeros_like(given["hidden_states"])
    for piece_bytes in PIECES:
        assert_matches_reference({"output": streamed(given, piece_bytes)}, given, grad_output)


@pytest.mark.parametrize("name,group_size", variants(256))
def test_formats(device, name, group_size):
    given = many(T=6, H=256, I=256, E=3, dtype=torch.bfloat16)
    for weight in ("gate_up_proj", "down_proj"):
        given[weight] = random_weight(given[weight].float(), name, group_size)
        given[weight].dtype = torch.bfloat16
    check(given, 1 << 21)


@pytest.mark.parametrize("case", ACTIVATION_CASES, ids=str)
def test_activations(device, case):
    given = away_from_kinks(many(gating=case.gating)) | case.options
    check(given, 60_000)


@pytest.mark.parametrize("routing", ["skewed", "one_expert", "empty_experts", "repeated"])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_routes(device, routing, ids_dtype):
    given = many(routing=routing, ids_dtype=ids_dtype, invalid_ids=True)
    for piece_bytes in PIECES:
        check(given, piece_bytes)


@pytest.mark.parametrize("moved", [(), LORA, LORA[::3]], ids=["host", "device", "some"])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_factors_anywhere(device, moved, lora_dtype):
    check(many(dtype=torch.bfloat16, lora_dtype=lora_dtype), 60_000, *moved)


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("options", [{"T": 0}, {"T": 1}, {"lora_rank": 0, "bias": False}])
def test_few_tokens_and_arguments(device, options, reduce):
    check(many(invalid_ids=True, **options) | {"reduce": reduce}, 60_000)


def test_transposed_weights(device):
    given = many(dtype=torch.bfloat16)
    for name in ("gate_up_proj", "down_proj"):
        given[name] = given[name].mT.contiguous().mT
    check(given, 60_000)


@pytest.mark.parametrize("lora_rank,each", [((8, 16), 6), ((3, 5), 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_mm(device, monkeypatch, lora_rank, each, transposed):
    """As on a GPU whose products torch groups; operands that are not aligned are multiplied one by one."""
    calls = []
    grouped_mm = torch.nn.functional.grouped_mm
    monkeypatch.setattr(grouped, "has_grouped_mm", lambda rows, weight: grouped.is_aligned(weight))
    monkeypatch.setattr(grouped.F, "grouped_mm", lambda *a, **k: calls.append(a) or grouped_mm(*a, **k))
    given = many(dtype=torch.bfloat16, lora_rank=lora_rank, invalid_ids=True)
    if transposed:
        given |= {name: given[name].mT.contiguous().mT for name in ("gate_up_proj", "down_proj")}
    for piece_bytes in PIECES:
        check(given, piece_bytes)
    assert calls and len(calls) % each == 0
