"""torch.compile(fullgraph=True) of a decoder with PEFT's LoRA on its experts: one graph, equal results."""

import pytest
import torch
from compile_runs import assert_graphs, kt_ops, uncompiled
from peft_models import adapted, loss_and_gradients, randomize
from tiny_models import tiny_batch
from torch._dynamo.testing import AotEagerAndRecordGraphs

from ktops.testing.budgets import gradient_budget, relative_error

pytestmark = pytest.mark.usefixtures("compiling")


def assert_same(actual: dict, expected: dict, dtype: torch.dtype = torch.float32) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        assert error <= gradient_budget(dtype, inner_size=64), f"{name}: relative error {error:.2e}"


def test_static():
    model, backend = adapted("qwen3_moe"), AotEagerAndRecordGraphs()
    expected = loss_and_gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    assert_same(uncompiled(loss_and_gradients(compiled)), expected)
    assert_graphs()
    assert kt_ops(backend.fw_graphs) == ["moe_sft_fwd"] * 2
    assert kt_ops(backend.bw_graphs) == ["moe_sft_bwd"] * 2


def test_dynamic_number_of_tokens():
    model = adapted("qwen3_moe", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (12, 17, 5):
        batch = tiny_batch(length=length)
        assert_same(uncompiled(loss_and_gradients(compiled, batch)), loss_and_gradients(model, batch))
    assert_graphs()


def test_inductor():
    block = adapted("qwen3_moe").base_model.model.model.layers[0].mlp
    hidden_states = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    inputs = {"hidden_states": hidden_states} | {n: p for n, p in block.named_parameters() if p.requires_grad}
    results = []
    for run in (block, torch.compile(block, fullgraph=True, dynamic=False)):
        output = run(hidden_states)
        gradients = torch.autograd.grad(output.square().mean(), list(inputs.values()))
        results.append({"loss": output} | dict(zip(inputs, gradients, strict=True)))
    assert len(inputs) == 5
    assert_same(results[1], results[0])
    assert_graphs()


def test_bfloat16_base():
    model = adapted("qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=1)
    expected = loss_and_gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(uncompiled(loss_and_gradients(compiled)), expected, torch.bfloat16)
    assert_graphs()


def test_inference():
    model, backend = adapted("qwen3_moe", num_hidden_layers=1), AotEagerAndRecordGraphs()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    with torch.no_grad():
        error = relative_error(compiled(**tiny_batch()).logits, model(**tiny_batch()).logits)
    assert error <= gradient_budget(torch.float32, inner_size=64)
    assert_graphs()
    assert kt_ops(backend.fw_graphs) == ["moe_fwd"]


def test_switching_adapters_recompiles():
    model = adapted("qwen3_moe", num_hidden_layers=1)
    model.add_adapter("second", model.peft_config["default"])
    randomize(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    losses = []
    for adapters in (["default"], ["default", "second"]):
        model.base_model.set_adapter(adapters)
        actual = uncompiled(loss_and_gradients(compiled))
        assert_same(actual, loss_and_gradients(model))
        losses.append(actual["loss"])
    with torch.no_grad(), model.disable_adapter():
        losses.append(compiled(**tiny_batch()).loss)
        assert relative_error(losses[-1], model(**tiny_batch()).loss) < gradient_budget(torch.float32, 64)
    assert len({round(loss.item(), 3) for loss in losses}) == 3
    assert_graphs(3)
