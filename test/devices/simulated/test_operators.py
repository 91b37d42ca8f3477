"""kt::moe_fwd, kt::moe_sft_fwd and kt::moe_sft_bwd with tokens and routes on a device."""

import itertools
import re

import pytest
import torch
from simulated.conftest import SIZES, TOKENS, Calls, inputs, on_device
from torch.utils.checkpoint import checkpoint

import ktops
from ktops.ops.arguments import GRADIENTS
from ktops.ops.check_devices import LORA
from ktops.testing.inputs import floating, op_arguments, require_grad
from ktops.testing.simulated_device import traffic

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EXPERTS = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
T, H, K = (SIZES[name] for name in "THK")


def gradients(arguments: dict, names: tuple[str, ...], grad_output: torch.Tensor) -> dict[str, torch.Tensor]:
    arguments = require_grad(arguments, *names)
    output = ktops.moe_sft(**arguments)
    found = torch.autograd.grad(output, [arguments[name] for name in names], grad_output)
    return {"output": output.detach(), **dict(zip(names, found, strict=True))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moved", [(), LORA, LORA[::3]], ids=["host", "device", "some"])
def test_equals_the_cpu(device, dtype, moved):
    given = inputs(dtype=dtype, invalid_ids=True)
    names = tuple(floating(given))
    grad_output = torch.randn(T, H).to(dtype)
    expected = gradients(given, names, grad_output)
    actual = gradients(on_device(given, *moved), names, grad_output.to(device))
    for name, value in expected.items():
        at = device if name in ("output", "hidden_states", "topk_weights", *moved) else torch.device("cpu")
        assert actual[name].device == at and torch.equal(actual[name].cpu(), value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_traffic(device, dtype, ids_dtype, weights_dtype):
    given = on_device(inputs(dtype=dtype, ids_dtype=ids_dtype, weights_dtype=weights_dtype))
    routes = T * K * (ids_dtype.itemsize + weights_dtype.itemsize)
    tokens = T * H * dtype.itemsize
    with torch.no_grad(), traffic() as inference:
        ktops.moe_sft(**given)
    given = require_grad(given, *floating(given))
    with traffic() as forward:
        output = ktops.moe_sft(**given)
    once = {"down": tokens + routes, "copies_down": 3, "up": tokens, "copies_up": 1}
    assert inference == forward == once
    grad_output = torch.ones(T, H, dtype=dtype).to(device)
    with traffic() as backward:
        output.backward(grad_output)
    weights = T * K * weights_dtype.itemsize
    assert backward == {"down": tokens, "copies_down": 1, "up": tokens + weights, "copies_up": 2}


def test_traffic_of_factors_on_the_device(device):
    """They are copied in forward and in backward, and their gradients go back."""
    given = require_grad(on_device(inputs(), *LORA), *LORA)
    factors = sum(given[name].nbytes for name in LORA)
    with traffic() as forward:
        output = ktops.moe_sft(**given)
    grad_output = torch.ones(T, H).to(device)
    with traffic() as backward:
        output.backward(grad_output)
    assert forward["down"] == 4 * T * H + T * K * (8 + 4) + factors and forward["copies_down"] == 3 + 4
    assert backward == {"down": 4 * T * H + factors, "copies_down": 1 + 4, "up": factors, "copies_up": 4}


def test_non_contiguous_tokens_are_moved_by_one_copy(device):
    given = inputs()
    moved = on_device(given)
    moved["hidden_states"] = given["hidden_states"].T.contiguous().to(device).T
    moved["topk_weights"] = given["topk_weights"].repeat_interleave(2, dim=1).to(device)[:, ::2]
    with torch.no_grad(), traffic() as moves:
        output = ktops.moe_sft(**moved)
    assert moves["copies_down"] == 3 and moves["down"] == 4 * T * H + T * K * (8 + 4)
    assert torch.equal(output.cpu(), ktops.moe_sft(**given))


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("reduce", [True, False])
def test_few_tokens(device, num_tokens, reduce):
    given = inputs(T=num_tokens)
    output = ktops.moe_sft(**on_device(given), reduce=reduce)
    assert output.device == device and torch.equal(output.cpu(), ktops.moe_sft(**given, reduce=reduce))


def test_saved_tensors_are_in_host_memory(device):
    """The device keeps nothing of the layer until backward."""
    saved = []
    given = require_grad(on_device(inputs()), "hidden_states", *LORA)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ktops.moe_sft(**given)
    assert len(saved) > 6 and {x.device.type for x in saved} == {"cpu"}


def call(op: str, given: dict, grad_output: torch.Tensor) -> None:
    arguments = op_arguments(given)
    if op == "moe_fwd":
        torch.ops.kt.moe_fwd(*arguments)
    elif op == "moe_sft_fwd":
        torch.ops.kt.moe_sft_fwd(*arguments, "activations")
    else:
        _, *saved, _, _, _ = torch.ops.kt.moe_sft_fwd(*op_arguments(inputs()), "activations")
        torch.ops.kt.moe_sft_bwd(grad_output, *arguments, "activations", *saved, 1)


@pytest.mark.parametrize("op", ["moe_fwd", "moe_sft_fwd", "moe_sft_bwd"])
@pytest.mark.parametrize("argument", EXPERTS)
def test_experts_on_the_device_are_an_error(device, op, argument):
    first = "grad_output" if op == "moe_sft_bwd" else "hidden_states"
    message = rf"kt::{op}: {argument} must be on cpu \({first} is on simgpu:0\), got simgpu:0.*ktops.off"
    with pytest.raises(RuntimeError, match=message):
        call(op, on_device(inputs(), argument), torch.ones(T, H).to(device))
    message = message.replace("is on simgpu:0", "is on cpu")
    with pytest.raises(RuntimeError, match=message):
        call(op, inputs() | {argument: inputs()[argument].to(device)}, torch.ones(T, H))


@pytest.mark.parametrize("op", ["moe_fwd", "moe_sft_fwd"])
@pytest.mark.parametrize("argument", TOKENS[1:])
def test_routes_elsewhere_are_an_error(device, op, argument):
    grad_output = torch.ones(T, H)
    for given, (own, other) in itertools.product(
        [inputs(), on_device(inputs())], [("cpu", "simgpu:0"), ("simgpu:0", "cpu")]
    ):
        if str(given["hidden_states"].device) != own:
            continue
        message = re.escape(f"kt::{op}: {argument} must be on {own} (hidden_states is on {own}), got {other}")
        with pytest.raises(RuntimeError, match=message):
            call(op, given | {argument: inputs()[argument].to(other)}, grad_output)


def test_factors_on_the_device_of_nothing_else_are_an_error(device):
    given = inputs() | {"down_lora_B": inputs()["down_lora_B"].to(device)}
    with pytest.raises(
        RuntimeError, match=r"down_lora_B must be on cpu \(hidden_states is on cpu\), got simgpu"
    ):
        ktops.moe_sft(**given)


def test_backward_takes_tokens_from_either(device):
    """As autograd calls it, with the copies in host memory, and with the tensors given to forward."""
    given = inputs()
    grad_output = torch.randn(T, H)
    _, *saved, _, _, _ = torch.ops.kt.moe_sft_fwd(*op_arguments(given), "activations")
    rest = "activations", *saved, (1 << len(GRADIENTS)) - 1
    expected = torch.ops.kt.moe_sft_bwd(grad_output, *op_arguments(given), *rest)
    for arguments in (op_arguments(given), op_arguments(on_device(given))):
        actual = torch.ops.kt.moe_sft_bwd(grad_output.to(device), *arguments, *rest)
        for name, value, wanted in zip(GRADIENTS, actual, expected, strict=True):
            assert (value.device == device) == (name in ("hidden_states", "topk_weights")), name
            assert torch.equal(value.cpu(), wanted), name


@pytest.mark.parametrize(
    "options",
    [
        {"use_reentrant": True},
        {"use_reentrant": False},
        {"use_reentrant": False, "context_fn": ktops.checkpoint_context_fn},
    ],
    ids=["reentrant", "non-reentrant", "selective"],
)
def test_checkpointing_counts_the_calls_of_the_cpu(device, options):
    counted, found = [], []
    for given in (inputs(), on_device(inputs())):
        given = require_grad(given, "hidden_states", *LORA)
        x = given.pop("hidden_states")
        with Calls() as calls:
            checkpoint(lambda x, given=given: ktops.moe_sft(x, **given).sin(), x, **options).sum().backward()
        found.append([x.grad, *(given[name].grad for name in LORA)])
        counted.append(calls.names)
    assert counted[0] == counted[1] and "moe_sft_bwd" in counted[0]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(*found, strict=True))
