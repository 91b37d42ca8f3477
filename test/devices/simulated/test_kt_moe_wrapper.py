"""KTMoEWrapper with tokens on a device: results of the CPU, each tensor copied once."""

import pytest
import torch
from tiny_layer import ALPHA, RANK, SIZES, TOKENS, adapters, inputs, make
from torch import nn

from ktops.compat import lora
from ktops.compat.kt_kernel.sft.autograd import KTMoEFunction
from ktops.compat.layer import Adapters, experts_of
from ktops.testing.simulated_device import traffic

pytestmark = pytest.mark.usefixtures("single_thread")

H, K = SIZES["hidden_size"], SIZES["num_experts_per_tok"]
X, ROUTES = 2 * TOKENS * H, TOKENS * K
"""Bytes of hidden_states, and their routes."""

DOWN = {"down": X + ROUTES * (8 + 4), "copies_down": 3}


def moved(routed, device) -> tuple:
    return tuple(tensor.to(device) for tensor in routed)


def model(deferred, **options) -> list:
    options = {"num_experts": 12, "num_experts_per_tok": 3, "num_gpu_experts": 2} | options
    return [
        make("BF16", layer_idx=i, max_deferred_experts_per_token=n, **options) for i, n in enumerate(deferred)
    ]


def trainable(method: str = "AMXBF16_SFT", **options):
    wrapper = make(method, **options)
    wrapper.init_lora_weights(**adapters(wrapper))
    return wrapper


def grad_output() -> torch.Tensor:
    return torch.randn(TOKENS, H, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("submit", [False, True])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_inference(device, ids_dtype, submit):
    (wrapper,) = model((0,), num_experts_per_tok=K)
    hidden_states, ids, weights = inputs(wrapper)
    routed = hidden_states, ids.to(ids_dtype), weights
    exact = wrapper.forward(*routed)
    routed = moved(routed, device)
    with traffic() as counted:
        if submit:
            wrapper.submit_forward(*routed, 0)
            for tensor in routed:
                tensor.zero_()
            output = wrapper.sync_forward(routed[0], 0)
        else:
            output = wrapper.forward(*routed)
    assert output.device == device and torch.equal(output.cpu(), exact)
    down = X + ROUTES * (ids_dtype.itemsize + 4)
    assert counted == {"down": down, "copies_down": 3, "up": X, "copies_up": 1}


def test_hidden_states_are_copied_in_the_dtype_of_the_computation(device):
    (wrapper,) = model((0,), num_experts_per_tok=K)
    hidden_states, ids, weights = inputs(wrapper)
    exact = wrapper.forward(hidden_states.float(), ids, weights)
    routed = moved((hidden_states.float(), ids, weights), device)
    with traffic() as counted:
        output = wrapper.forward(*routed)
    assert counted == {**DOWN, "up": X, "copies_up": 1}
    assert output.dtype == torch.float32 and torch.equal(output.cpu(), exact)


def test_deferred_experts(device):
    layers, outputs = model((2, 1, 0)), []
    for place in ("cpu", device):
        x = inputs(layers[0])[0].to(place)
        for wrapper in layers:
            _, ids, weights = moved(inputs(wrapper, seed=wrapper.layer_idx), place)
            wrapper.submit_forward(x, ids, weights)
            x = x + wrapper.sync_forward(x)
        outputs.append(x.cpu())
    assert torch.equal(*outputs)


@pytest.mark.parametrize("method", ["BF16", "AMXBF16_SFT_SkipLoRA"])
@pytest.mark.parametrize("index", [1, 2])
def test_routes_elsewhere_are_an_error(device, index, method):
    wrapper = make(method)
    for own, other in (("cpu", "simgpu:0"), ("simgpu:0", "cpu")):
        routed = list(moved(inputs(wrapper), own))
        routed[index] = routed[index].to(other)
        name = ("topk_ids", "topk_weights")[index - 1]
        message = f"KTMoEWrapper: {name} must be on {own}, the device of hidden_states, got {other}"
        with pytest.raises(ValueError, match=message):
            wrapper.submit_forward(*routed)


@pytest.mark.parametrize("submit", [False, True])
@pytest.mark.parametrize("output_on", ["cpu", "simgpu:0"])
@pytest.mark.parametrize("grad_on", ["cpu", "simgpu:0"])
def test_training(device, output_on, grad_on, submit):
    wrapper = trainable(num_gpu_experts=1)
    output = wrapper.forward(*inputs(wrapper))
    exact = [output, *wrapper.backward(grad_output())]
    factors = [getattr(wrapper, f"grad_{name}").clone() for name in lora.NAMES]
    routed, grad = moved(inputs(wrapper), device), grad_output().to(grad_on)
    to = None if output_on == "cpu" else torch.device(output_on)
    with traffic() as forward:
        if submit:
            wrapper.submit_forward(*routed)
            actual = [wrapper.sync_forward(to)]
        else:
            actual = [wrapper.forward(*routed, output_device=to)]
    with traffic() as backward:
        if submit:
            wrapper.submit_backward_async(grad, to)
            actual += wrapper.sync_backward()
        else:
            actual += wrapper.backward(grad, to)
    assert {str(tensor.device) for tensor in actual} == {output_on}
    assert all(torch.equal(a.cpu(), b) for a, b in zip(actual, exact, strict=True))
    assert all(
        torch.equal(getattr(wrapper, f"grad_{n}"), g) for n, g in zip(lora.NAMES, factors, strict=True)
    )
    assert forward == {**DOWN, **({"up": X, "copies_up": 1} if to else {})}
    down = {"down": X, "copies_down": 1} if grad_on != "cpu" else {}
    assert backward == {**down, **({"up": X + 4 * ROUTES, "copies_up": 2} if to else {})}


def test_inference_with_adapters(device):
    wrapper = trainable()
    exact = wrapper.forward(*inputs(wrapper), save_for_backward=False)
    routed = moved(inputs(wrapper), device)
    with traffic() as counted:
        wrapper.submit_forward_inference(*routed, 0)
        output = wrapper.sync_forward_inference(0)
    assert counted == {**DOWN, "up": X, "copies_up": 1}
    assert output.device == device and torch.equal(output.cpu(), exact)


def test_function_of_autograd(device):
    results = []
    for place in ("cpu", device):
        wrapper = trainable()
        x, ids, weights = moved(inputs(wrapper), place)
        x, weights, grad = x.requires_grad_(), weights.requires_grad_(), grad_output().to(place)
        with traffic() as counted:
            output = KTMoEFunction.apply(x, ids, weights, wrapper)
            output.backward(grad)
        assert output.device == x.grad.device == weights.grad.device == x.device
        grads = [getattr(wrapper, f"grad_{name}") for name in lora.NAMES]
        results.append([output.detach().cpu(), x.grad.cpu(), weights.grad.cpu(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counted == {"down": DOWN["down"] + X, "copies_down": 4, "up": 2 * X + 4 * ROUTES, "copies_up": 3}


def test_experts_of_wrapped_blocks(device):
    """Each tensor is moved once in forward, and once in backward, by the operators."""
    results = []
    for place in ("cpu", device):
        backend = trainable()
        experts = experts_of(backend)
        factors = Adapters({name: nn.Parameter(value) for name, value in adapters(backend).items()})
        experts.adapters = factors, ALPHA / RANK
        x, ids, weights = moved(inputs(backend), place)
        x, grad = x.requires_grad_(), grad_output().to(place)
        with traffic() as counted:
            output = experts(x, ids, weights)
            output.backward(grad)
        results.append([output.detach().cpu(), x.grad.cpu(), *(p.grad for p in factors.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counted == {"down": DOWN["down"] + X, "copies_down": 4, "up": 2 * X, "copies_up": 2}
