"""torch.compile and gradient checkpointing of a model whose experts run in the op."""

from collections import Counter

import every_model
import pytest
import torch
from compile_runs import assert_graphs, kt_ops, uncompiled
from model_runs import MODEL_BUDGET, experts_modules, step
from tiny_models import tiny_batch, tiny_model
from torch._dynamo.testing import AotEagerAndRecordGraphs

import ktops
from ktops.testing.budgets import relative_error

pytestmark = pytest.mark.usefixtures("compiling")


def ktops_model(architecture="qwen3_moe", **keys):
    return tiny_model(architecture, experts_implementation="ktops", **keys)


def swapped_model(architecture="qwen3_moe", **keys):
    model = tiny_model(architecture, **keys)
    ktops.swap_experts(model)
    return model


both_ways = pytest.mark.parametrize("make", [ktops_model, swapped_model])


def assert_equal_steps(actual, expected):
    assert relative_error(actual.loss, expected.loss) < MODEL_BUDGET
    gradients = uncompiled(actual.gradients)
    for name, gradient in expected.gradients.items():
        assert relative_error(gradients[name], gradient) < MODEL_BUDGET, name


def compiled(model, **options):
    """Returns the compiled model, and a function that counts the kt operators in its graphs."""
    backend = AotEagerAndRecordGraphs()

    def ops() -> Counter:
        return Counter(kt_ops(backend.fw_graphs + backend.bw_graphs))

    return torch.compile(model, fullgraph=True, backend=backend, **options), ops


@pytest.mark.parametrize(("make", "layers"), [(ktops_model, 2), (swapped_model, 1)])
def test_compiled_without_graph_breaks(make, layers):
    expected = step(make(num_hidden_layers=layers))
    model, ops = compiled(make(num_hidden_layers=layers))
    assert_equal_steps(step(model, count=False), expected)
    assert ops() == {"moe_sft_fwd": layers, "moe_sft_bwd": layers}
    assert_graphs()


@pytest.mark.parametrize("folder", ["dbrx", "llama4", "longcat_flash", "switch_transformers"])
def test_compiled_experts_outside_the_interface(folder):
    """The experts alone, since not every model compiles in one graph."""
    model = every_model.tiny_model(folder)
    [name, *_] = ktops.swap_experts(model)
    experts, calls = model.get_submodule(name), []
    with experts.register_forward_pre_hook(lambda module, args: calls.append(args)):
        model(**every_model.tiny_batch(folder))
    args = [argument.detach() for argument in calls[0]]
    run, ops = compiled(experts)
    expected, actual = (_output_and_gradients(each, args) for each in (experts, run))
    for value, expected_value in zip(actual, expected, strict=True):
        assert relative_error(value, expected_value) < MODEL_BUDGET
    assert ops() == {"moe_sft_fwd": 1, "moe_sft_bwd": 1}
    assert_graphs()


def _output_and_gradients(experts: torch.nn.Module, args: list[torch.Tensor]) -> list[torch.Tensor]:
    experts.zero_grad()
    output = experts(*args)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad.clone() for parameter in experts.parameters())]


def test_compiled_with_dynamic_shapes():
    """One graph serves every number of tokens."""
    model, ops = compiled(ktops_model(num_hidden_layers=1))
    for length in (5, 12, 9):
        batch = tiny_batch(length=length)
        for tensor in batch.values():
            torch._dynamo.mark_dynamic(tensor, 1)
        expected = step(ktops_model(num_hidden_layers=1), batch)
        assert_equal_steps(step(model, batch, count=False), expected)
    assert ops() == {"moe_sft_fwd": 1, "moe_sft_bwd": 1}
    assert_graphs()


@both_ways
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_gradient_checkpointing(make, use_reentrant, architecture):
    """Gradients are the same; the forward of every layer's experts runs twice."""
    expected = step(make(architecture))
    model = make(architecture)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    actual = step(model)
    assert_equal_steps(actual, expected)
    layers = len(experts_modules(model))
    assert actual.ops["moe_sft_fwd"] + actual.ops["moe_fwd"] == 2 * layers
    assert actual.ops["moe_sft_bwd"] == layers


def test_selective_checkpointing_keeps_the_experts_forward():
    """With ktops.checkpoint_context_fn, the experts are not recomputed."""
    expected = step(ktops_model())
    model = ktops_model()
    options = {"use_reentrant": False, "context_fn": ktops.checkpoint_context_fn}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    actual = step(model)
    assert_equal_steps(actual, expected)
    assert actual.ops == {"moe_sft_fwd": 2, "moe_sft_bwd": 2}


def test_compiled_inference_runs_the_inference_op():
    model = ktops_model(num_hidden_layers=1).eval()
    called, ops = compiled(model)
    ids = tiny_batch()["input_ids"]
    with torch.no_grad():
        actual, expected = called(input_ids=ids).logits, model(input_ids=ids).logits
    assert relative_error(actual, expected) < MODEL_BUDGET
    assert ops() == {"moe_fwd": 1}
