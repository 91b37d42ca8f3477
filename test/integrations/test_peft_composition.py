"""PEFT models in typical training loops: preference losses, accumulation, copies, checkpointing."""

import copy

import peft
import pytest
import torch
from packaging.version import Version
from peft_models import Recorder, adapted, loss_and_gradients, randomize
from tiny_models import tiny_batch, tiny_model
from transformers.integrations.peft import MIN_PEFT_VERSION

import ktops
from ktops.integrations.peft import expert_target_parameters
from ktops.testing.budgets import gradient_budget, relative_error

pytestmark = pytest.mark.usefixtures("enabled")


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_bitwise(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def assert_sum(actual: dict, *terms: dict) -> None:
    """Asserts equality up to the order of additions."""
    for name, value in actual.items():
        error = relative_error(value, sum(term[name].double() for term in terms))
        assert error <= gradient_budget(torch.float32, inner_size=64), f"{name}: {error:.2e}"


def separate_gradients(model) -> list[dict]:
    results = []
    for seed in (0, 1):
        results.append(loss_and_gradients(model, tiny_batch(seed)))
    model.zero_grad()
    return results


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_then_two_backwards(order):
    model = adapted("qwen3_moe")
    separate = separate_gradients(model)
    losses = [model(**tiny_batch(seed)).loss for seed in (0, 1)]
    for i in order:
        losses[i].backward()
    assert_sum(gradients(model), *separate)


def test_preference_loss_with_the_base_as_reference():
    """One loss compares two forwards with the adapter and two without, as DPO does with a PEFT model."""

    def loss(model):
        chosen, rejected = (model(**tiny_batch(seed)).loss for seed in (0, 1))
        with torch.no_grad(), model.disable_adapter():
            base_chosen, base_rejected = (model(**tiny_batch(seed)).loss for seed in (0, 1))
        return -torch.nn.functional.logsigmoid((rejected - base_rejected) - (chosen - base_chosen))

    results = []
    for implementation in ("ktops", "eager"):
        model = adapted("qwen3_moe", implementation)
        loss(model).backward()
        results.append(gradients(model))
    for name, value in results[1].items():
        cosine = torch.nn.functional.cosine_similarity(results[0][name].ravel(), value.ravel(), dim=0)
        assert cosine > 0.999, name


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_accumulation(set_to_none):
    model = adapted("qwen3_moe")
    separate = separate_gradients(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=set_to_none)
        for seed in (0, 1):
            model(**tiny_batch(seed)).loss.backward()
        assert_sum(gradients(model), *separate)
        optimizer.step()


def test_two_models_in_one_process():
    first, second = adapted("qwen3_moe"), adapted("mixtral", dtype=torch.bfloat16)
    expected = [loss_and_gradients(model) for model in (first, second)]
    for model in (first, second):
        model.zero_grad()
    losses = [model(**tiny_batch()).loss for model in (first, second)]
    for loss in losses:
        loss.backward()
    for model, loss, value in zip((first, second), losses, expected, strict=True):
        assert_bitwise({"loss": loss, **gradients(model)}, value)


def test_deepcopy():
    model = adapted("qwen3_moe")
    expected = loss_and_gradients(model)
    duplicate = copy.deepcopy(model)
    randomize(model, seed=2)
    with Recorder() as recorder:
        assert_bitwise(loss_and_gradients(duplicate), expected)
    assert recorder.calls == {"moe_sft_fwd": 2, "moe_sft_bwd": 2}
    assert relative_error(loss_and_gradients(model)["loss"], expected["loss"]) > 1e-3


def test_state_dict_round_trip():
    model, other = adapted("qwen3_moe"), adapted("qwen3_moe", "eager")
    randomize(other, seed=3)
    assert list(model.state_dict()) == list(other.state_dict())
    other.load_state_dict(model.state_dict())
    other.set_experts_implementation("ktops")
    assert_bitwise(loss_and_gradients(other), loss_and_gradients(model))


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ({"use_reentrant": True}, {"moe_fwd": 2, "moe_sft_fwd": 2}),
        ({"use_reentrant": False}, {"moe_sft_fwd": 4}),
        ({"use_reentrant": False, "context_fn": ktops.checkpoint_context_fn}, {"moe_sft_fwd": 2}),
    ],
    ids=["reentrant", "non-reentrant", "selective"],
)
def test_checkpointed_layers(options, forwards):
    model = adapted("qwen3_moe", dtype=torch.bfloat16)
    expected = loss_and_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(options)
    with Recorder() as recorder:
        actual = loss_and_gradients(model)
    assert recorder.calls == {"moe_sft_bwd": 2, **forwards}
    assert_bitwise(actual, expected)


def test_training_reaches_the_same_adapters_as_plain_peft():
    results = []
    for implementation in ("ktops", "eager"):
        model = adapted("olmoe", implementation)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        for step in range(4):
            optimizer.zero_grad()
            model(**tiny_batch(step)).loss.backward()
            optimizer.step()
        results.append({n: p.detach() - before[n] for n, p in model.named_parameters() if n in before})
    for name, value in results[1].items():
        cosine = torch.nn.functional.cosine_similarity(results[0][name].ravel(), value.ravel(), dim=0)
        assert cosine > 0.999, name


def test_add_adapter_of_transformers_works_with_the_peft_that_it_names():
    """With an older PEFT it raises and names the required version; PEFT's own methods have no such check."""
    model = tiny_model("qwen3_moe", experts_implementation="ktops")
    config = peft.LoraConfig(r=2, target_parameters=expert_target_parameters(model))
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        with pytest.raises(ValueError, match=f"PEFT .* use a version >= {MIN_PEFT_VERSION}"):
            model.add_adapter(config)
        model = peft.get_peft_model(model, config)
    else:
        model.add_adapter(config)
    with Recorder() as recorder:
        found = loss_and_gradients(model)
    assert recorder.calls["moe_sft_fwd"] and not recorder.made_expert_stack(model)
    assert sum("lora_" in name for name in found) == 4 * model.config.num_hidden_layers
