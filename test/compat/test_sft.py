"""KTMoEWrapper in mode "sft": state between forward, backward and the optimizer's step."""

import pytest
import torch
from tiny_layer import (
    SIZES,
    TOKENS,
    adapters,
    assert_close,
    inputs,
    make,
    reference_gradients,
    train,
    weights,
)

from ktops.compat.lora import NAMES, join, shapes, split
from ktops.testing.budgets import gradient_budget

pytestmark = pytest.mark.usefixtures("single_thread")

BUDGET = gradient_budget(torch.bfloat16)
H = SIZES["hidden_size"]


def trainable(factors: dict | None = None, **options):
    wrapper = make("AMXBF16_SFT", **options)
    wrapper.init_lora_weights(**(factors or adapters(wrapper)))
    return wrapper


def grad_output(tokens: int = TOKENS, seed: int = 1):
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(seed)).bfloat16()


def adapter_grads(wrapper, scale: float = 1.0) -> dict:
    return {name: scale * getattr(wrapper, f"grad_{name}").double() for name in NAMES}


def expected_grads(wrapper, routed, factors, grad, scale: float = 1.0) -> dict:
    gradients = reference_gradients(wrapper, routed, factors, grad)
    return {name: scale * gradients[name] for name in NAMES}


def test_join_and_split_are_inverse():
    sizes = shapes(3, 8, 5, 2)
    gate_up = [torch.randn(sizes[name]) for name in NAMES[:4]]
    joint = join(*gate_up)
    assert [list(t.shape) for t in joint] == [[3, 4, 8], [3, 10, 4]]
    assert all(torch.equal(a, b) for a, b in zip(split(*joint), gate_up, strict=True))
    gate_a, gate_b, up_a, up_b = gate_up
    assert torch.allclose(joint[1] @ joint[0], torch.cat([gate_b @ gate_a, up_b @ up_a], 1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradients_have_the_dtype_of_the_adapters(dtype):
    factors = adapters(make("AMXBF16_SFT", load=False), dtype)
    wrapper, routed = trainable(factors), inputs(make("AMXBF16_SFT", load=False))
    actual = train(wrapper, routed, factors, grad_output())
    assert {actual[name].dtype for name in NAMES} == {dtype}
    assert_close(actual, reference_gradients(wrapper, routed, factors, grad_output()), BUDGET)


def test_gradients_go_to_the_tensors_given():
    wrapper = make("AMXBF16_SFT")
    factors = adapters(wrapper)
    grads = {f"grad_{name}": torch.full_like(t, torch.nan) for name, t in factors.items()}
    wrapper.init_lora_weights(*factors.values(), *grads.values())
    for seed in (0, 1):
        routed = inputs(wrapper, seed=seed)
        train(wrapper, routed, factors, grad_output())
        expected = expected_grads(wrapper, routed, factors, grad_output())
        assert_close({name: grads[f"grad_{name}"] for name in NAMES}, expected, BUDGET)


def test_the_newest_forward_comes_first():
    wrapper = trainable(max_cache_depth=3)
    runs = [(inputs(wrapper, tokens, seed=tokens), grad_output(tokens, seed=tokens)) for tokens in (3, 5, 5)]
    for routed, _ in runs:
        wrapper.forward(*routed)
    for routed, grad in reversed(runs):
        grad_input, grad_weights = wrapper.backward(grad)
        expected = reference_gradients(wrapper, routed, adapters(wrapper), grad)
        actual = {"grad_input": grad_input, "grad_weights": grad_weights, **adapter_grads(wrapper)}
        del expected["output"]
        assert_close(actual, expected, BUDGET)
    with pytest.raises(RuntimeError, match=r"no forward to differentiate: call forward\(save_for"):
        wrapper.backward(grad_output())


def test_older_forwards_than_the_depth_are_forgotten():
    wrapper = trainable(max_cache_depth=2)
    for seed in range(4):
        wrapper.forward(*inputs(wrapper, seed=seed))
    wrapper.forward(*inputs(wrapper), save_for_backward=False)
    for seed in (3, 2):
        grad_input, _ = wrapper.backward(grad_output())
        expected = reference_gradients(wrapper, inputs(wrapper, seed=seed), adapters(wrapper), grad_output())
        assert_close({"grad_input": grad_input}, {"grad_input": expected["grad_input"]}, BUDGET)
    with pytest.raises(RuntimeError, match="max_cache_depth=2 forwards are kept"):
        wrapper.backward(grad_output())


def test_inputs_may_change_before_backward():
    wrapper = trainable()
    routed = inputs(wrapper)
    expected = reference_gradients(wrapper, routed, adapters(wrapper), grad_output())
    output = wrapper.forward(*routed)
    for tensor in routed:
        tensor.zero_()
    grad_input, grad_weights = wrapper.backward(grad_output())
    actual = {"output": output, "grad_input": grad_input, "grad_weights": grad_weights}
    assert_close(actual | adapter_grads(wrapper), expected, BUDGET)


def test_no_tokens():
    wrapper = trainable()
    actual = train(wrapper, inputs(wrapper, 0), adapters(wrapper), grad_output(0))
    assert actual["grad_input"].shape == actual["output"].shape == (0, H)
    assert not any(actual[name].any() for name in NAMES)


def test_forward_works_without_grad_mode():
    """Runs as in the forward of an autograd function."""
    wrapper = trainable()
    with torch.no_grad():
        output = wrapper.forward(*inputs(wrapper))
    assert not output.requires_grad
    expected = reference_gradients(wrapper, inputs(wrapper), adapters(wrapper), grad_output())
    assert_close(
        {"grad_input": wrapper.backward(grad_output())[0]}, {"grad_input": expected["grad_input"]}, BUDGET
    )


@pytest.mark.parametrize("how", ["in place", "update_lora_weights"])
def test_changed_adapters_are_used(how):
    wrapper = make("AMXBF16_SFT")
    factors, later = adapters(wrapper), adapters(wrapper, seed=9)
    wrapper.init_lora_weights(**factors)
    train(wrapper, inputs(wrapper), factors, grad_output())
    with torch.no_grad():
        for name, tensor in factors.items():
            (tensor if how == "in place" else tensor.data).copy_(later[name])
    if how == "update_lora_weights":
        wrapper.update_lora_weights()
    actual = train(wrapper, inputs(wrapper), factors, grad_output())
    assert_close(actual, reference_gradients(wrapper, inputs(wrapper), later, grad_output()), BUDGET)


def test_parameters_accumulate_until_zero_grad():
    wrapper = make("AMXBF16_SFT")
    factors = {name: torch.nn.Parameter(t.float()) for name, t in adapters(wrapper).items()}
    wrapper.init_lora_weights(**factors)
    detached = {name: t.detach() for name, t in factors.items()}
    routed = inputs(wrapper)
    single = expected_grads(wrapper, routed, detached, grad_output())
    for scale, total in ((1.0, 1.0), (0.5, 1.5)):
        wrapper.forward(*routed)
        wrapper.backward(grad_output(), optimizer_grad_scale=scale)
        assert all(factors[name].grad is getattr(wrapper, f"grad_{name}") for name in NAMES)
        assert_close(adapter_grads(wrapper, 1 / total), single, BUDGET)
    for factor in factors.values():
        factor.data.add_(factor.grad, alpha=-0.1)
        factor.grad = None
    wrapper.update_lora_weights()
    detached = {name: t.detach() for name, t in factors.items()}
    train(wrapper, routed, factors, grad_output())
    expected = expected_grads(wrapper, routed, detached, grad_output())
    assert_close(adapter_grads(wrapper), expected, BUDGET)


def test_a_replaced_gradient_is_an_error():
    wrapper = make("AMXBF16_SFT")
    factors = {name: torch.nn.Parameter(t) for name, t in adapters(wrapper).items()}
    wrapper.init_lora_weights(**factors)
    wrapper.forward(*inputs(wrapper))
    factors["up_lora_a"].grad = torch.zeros_like(factors["up_lora_a"])
    with pytest.raises(RuntimeError, match=r"up_lora_a\.grad must be None or the tensor grad_up_lora_a"):
        wrapper.backward(grad_output())
    factors["up_lora_a"].grad = None
    wrapper.backward(grad_output())


def test_background_forward_and_backward():
    wrapper = trainable(max_cache_depth=2)
    routed = inputs(wrapper)
    expected = reference_gradients(wrapper, routed, adapters(wrapper), grad_output())
    wrapper.submit_forward(*routed)
    output = wrapper.sync_forward()
    wrapper.submit_backward_async(grad_output(), optimizer_grad_scale=2.0)
    grad_input, grad_weights = wrapper.sync_backward()
    actual = {"output": output, "grad_input": grad_input, "grad_weights": grad_weights}
    assert_close(actual | adapter_grads(wrapper, 0.5), expected, BUDGET)
    wrapper.submit_forward(*routed, save_for_backward=False)
    assert torch.equal(wrapper.sync_forward(torch.device("cpu")), output)
    with pytest.raises(RuntimeError, match="no forward to differentiate"):
        wrapper.submit_backward_async(grad_output())
    with pytest.raises(RuntimeError, match="no pending backward: call submit_backward_async"):
        wrapper.sync_backward()


def test_experts_on_the_gpu_are_skipped():
    wrapper = trainable(num_gpu_experts=2)
    assert wrapper.num_gpu_experts == 2
    hidden_states, ids, topk_weights = inputs(wrapper)
    here = hidden_states, ids.masked_fill(ids < 2, -1), topk_weights
    actual = train(wrapper, (hidden_states, ids, topk_weights), adapters(wrapper), grad_output())
    assert_close(actual, reference_gradients(wrapper, here, adapters(wrapper), grad_output()), BUDGET)
    assert not wrapper.grad_gate_lora_a[:2].any() and not actual["grad_weights"][ids < 2].any()


def test_skip_lora_needs_no_adapters():
    wrapper = make("AMXBF16_SFT_SkipLoRA")
    wrapper.update_lora_weights()
    actual = train(wrapper, inputs(wrapper), None, grad_output())
    assert_close(actual, reference_gradients(wrapper, inputs(wrapper), None, grad_output()), BUDGET)


def test_adapters_must_be_initialized():
    wrapper = make("AMXBF16_SFT", load=False)
    with pytest.raises(RuntimeError, match="weights not loaded"):
        wrapper.update_lora_weights()
    wrapper.load_weights_from_tensors(*weights(wrapper))
    for call in (wrapper.update_lora_weights, lambda: wrapper.forward(*inputs(wrapper))):
        with pytest.raises(RuntimeError, match=r"LoRA weights not initialized: call init_lora_weights\(\)"):
            call()


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("gate_lora_a", lambda t: t[:, 1:], ValueError, r"must have shape \[4, 4, 64\], got \[4, 3, 64\]"),
        ("up_lora_b", lambda t: t[1:], ValueError, r"must have shape \[4, 96, 4\], got \[3, 96, 4\]"),
        ("down_lora_b", lambda t: t.int(), TypeError, "must have one of the dtypes .*, got torch.int32"),
        ("down_lora_a", lambda t: t.to("meta"), ValueError, "must be on the CPU, got meta"),
        ("grad_up_lora_a", lambda t: t[..., 0], ValueError, r"must have shape \[4, 4, 64\], got \[4, 4\]"),
        (
            "grad_up_lora_a",
            lambda t: t.double(),
            TypeError,
            "must have the dtype of up_lora_a=torch.bfloat16",
        ),
    ],
)
def test_wrong_adapters(name, change, error, message):
    wrapper = make("AMXBF16_SFT", load=False)
    given = adapters(wrapper)
    given[name] = change(given[name.removeprefix("grad_")])
    with pytest.raises(error, match=f"KTMoEWrapper: {name} {message}"):
        wrapper.init_lora_weights(**given)
    assert wrapper.up_lora_a is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(TOKENS, H + 1),), r"grad_output must have shape \[7, 64\], got \[7, 65\]"),
        ((torch.zeros(TOKENS, H), None, 0.0), "optimizer_grad_scale must be positive and finite, got 0.0"),
    ],
)
def test_wrong_backward_keeps_the_forward(arguments, message):
    wrapper = trainable()
    wrapper.forward(*inputs(wrapper))
    with pytest.raises(ValueError, match=f"KTMoEWrapper: {message}"):
        wrapper.backward(*arguments)
    wrapper.backward(grad_output())
