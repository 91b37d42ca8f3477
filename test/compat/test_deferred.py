"""Experts deferred to the next layer, and forwards in the background."""

import gc
import threading

import pytest
import torch
from tiny_layer import SIZES, TOKENS, assert_close, inputs, make, reference

from ktops._warn import warn_once
from ktops.compat.calls import worker
from ktops.testing.budgets import forward_budget

pytestmark = pytest.mark.usefixtures("single_thread")


MANY = {"num_experts": 24, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
"""Enough experts that other tokens need few of those with small weights."""


def model(deferred: list[int]) -> list:
    return [
        make("BF16", layer_idx=i, max_deferred_experts_per_token=count, **MANY)
        for i, count in enumerate(deferred)
    ]


def close(actual, expected):
    assert_close({"sum": actual}, {"sum": expected}, forward_budget(torch.bfloat16))


def run(layers, seed: int = 0, submit: bool = False):
    """Returns the outputs of the layers, each for its own inputs, and the outputs without deferring."""
    outputs, expected = [], []
    for index, wrapper in enumerate(layers):
        routed = inputs(wrapper, seed=seed + index)
        if submit:
            wrapper.submit_forward(*routed)
            outputs.append(wrapper.sync_forward(routed[0]).double())
        else:
            outputs.append(wrapper.forward(*routed).double())
        expected.append(reference(wrapper, *routed))
    return outputs, expected


@pytest.mark.parametrize("submit", [False, True])
def test_the_sum_over_layers_is_the_same(submit):
    layers = model([1, 3, 2, 0])
    for seed in (0, 10):
        outputs, expected = run(layers, seed, submit)
        close(sum(outputs), sum(expected))
        assert (outputs[0] - expected[0]).norm() > 0.05 * expected[0].norm()


def test_the_next_layer_adds_it():
    first, second = model([1, 0])
    routed, other = inputs(first), inputs(second, seed=1)
    hidden_states, ids, topk_weights = routed
    immediate, deferred = first.select_deferred_experts(ids, topk_weights, 2)
    late = reference(first, hidden_states, deferred, topk_weights)
    close(first.forward(*routed), reference(first, hidden_states, immediate, topk_weights))
    close(second.forward(*other), reference(second, *other) + late)
    close(second.forward(*other), reference(second, *other))


def test_inputs_may_change_before_the_next_layer():
    """An event delays the background thread until the inputs have changed."""
    first, second = model([1, 0])
    routed, other, held = inputs(first), inputs(second, seed=1), threading.Event()
    total = reference(first, *routed) + reference(second, *other)
    worker().submit(held.wait)
    early = first.forward(*routed).double()
    for tensor in routed:
        tensor.zero_()
    held.set()
    close(early + second.forward(*other), total)


def test_all_may_be_deferred():
    first, second = model([3, 0])
    routed = inputs(first)
    assert not first.forward(*routed).any()
    close(second.forward(*routed), reference(first, *routed) + reference(second, *routed))


def test_which_are_deferred():
    wrapper = make("BF16", load=False, num_experts=6, num_experts_per_tok=3)
    ids = torch.tensor([[0, 1, 2], [3, 4, 2], [5, 1, -1]])
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.1, 0.2, 0.7]])
    immediate, deferred = wrapper.select_deferred_experts(ids, scores, 1)
    assert immediate.tolist() == [[0, -1, -1], [-1, 4, -1], [-1, -1, -1]]
    assert deferred.tolist() == [[-1, 1, 2], [3, -1, 2], [5, 1, -1]]
    immediate, deferred = wrapper.select_deferred_experts(ids, scores, 2)
    assert immediate.tolist() == [[0, 1, 2], [-1, 4, 2], [-1, 1, -1]]
    assert deferred.tolist() == [[-1, -1, -1], [3, -1, -1], [5, -1, -1]]
    assert wrapper.select_deferred_experts(ids, scores, 0)[1].tolist() == ids.tolist()
    assert not (wrapper.select_deferred_experts(ids, scores, 7)[1] >= 0).any()


def test_two_models_do_not_mix():
    first, second = model([1, 0]), model([2, 0])
    outputs = [wrapper.forward(*inputs(wrapper)).double() for pair in zip(first, second) for wrapper in pair]  # noqa: B905
    expected = [reference(wrapper, *inputs(wrapper)) for wrapper in (*first, *second)]
    close(outputs[0] + outputs[2], expected[0] + expected[1])
    close(outputs[1] + outputs[3], expected[2] + expected[3])


def test_another_model_that_begins_later():
    """The other model's first layer with experts has the index of this model's second."""
    first, second = model([1, 0])
    other = make("BF16", layer_idx=1, **MANY)
    late = first.forward(*inputs(first)).double()
    close(other.forward(*inputs(other)), reference(other, *inputs(other)))
    close(late + second.forward(*inputs(second)), 2 * reference(second, *inputs(second)))


def test_layers_without_experts_in_between():
    first = make("BF16", layer_idx=3, max_deferred_experts_per_token=1, **MANY)
    second = make("BF16", layer_idx=7, **MANY)
    outputs, expected = run([first, second])
    close(sum(outputs), sum(expected))


def test_another_number_of_tokens():
    first, second = model([1, 0])
    first.forward(*inputs(first))
    with pytest.raises(RuntimeError, match="layer 0 deferred experts of 7 tokens, but layer 1 got 3 tokens"):
        second.forward(*inputs(second, 3))
    close(second.forward(*inputs(second, 3)), reference(second, *inputs(second, 3)))


def test_what_nobody_adds_is_warned_of():
    warn_once.cache_clear()
    (last,) = model([1])
    last.forward(*inputs(last))
    with pytest.warns(UserWarning, match="layer 0 deferred were never added. Set max_deferred_experts"):
        last.forward(*inputs(last))


def test_layers_are_freed():
    layers = model([1, 0])
    last = layers.pop()
    layers.clear()
    gc.collect()
    assert last._previous() is None
    close(last.forward(*inputs(last)), reference(last, *inputs(last)))


def test_submitted_forwards_of_several_layers():
    layers = model([0, 0])
    for wrapper in layers:
        wrapper.submit_forward(*inputs(wrapper, seed=wrapper.layer_idx))
    for wrapper in layers:
        output = wrapper.sync_forward(torch.empty(TOKENS, SIZES["hidden_size"]))
        assert output.dtype == torch.float32
        close(output, reference(wrapper, *inputs(wrapper, seed=wrapper.layer_idx)))
