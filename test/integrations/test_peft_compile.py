"""torch.compile(fullgraph=True) with PEFT's LoRA on the experts: one graph, equal results.

One test compiles a whole decoder; the others a MoE block, where the adapters are.
"""

import itertools

import pytest
import torch
from compile_runs import assert_graphs, kt_ops, uncompiled
from peft import PeftModel
from peft_models import adapted, loss_and_gradients, randomize
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


def moe_block(model: PeftModel) -> torch.nn.Module:
    return model.base_model.model.model.layers[0].mlp


def random_rows(tokens: int = 12, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(0)).to(dtype)


def output_and_gradients(block, run, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the output of a block, or of what was compiled of it, and its gradients."""
    hidden_states = hidden_states.detach().requires_grad_()
    inputs = {"hidden_states": hidden_states} | {n: p for n, p in block.named_parameters() if p.requires_grad}
    output = run(hidden_states)
    gradients = torch.autograd.grad(output.float().square().mean(), list(inputs.values()), allow_unused=True)
    found = {name: gradient for name, gradient in zip(inputs, gradients, strict=True) if gradient is not None}
    return {"output": output.detach()} | found


def test_dynamic_number_of_tokens():
    block = moe_block(adapted("qwen3_moe"))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (12, 17, 5):
        actual = output_and_gradients(block, compiled, random_rows(tokens))
        assert_same(actual, output_and_gradients(block, block, random_rows(tokens)))
    assert_graphs()


def test_inductor():
    block = moe_block(adapted("qwen3_moe"))
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    actual = output_and_gradients(block, compiled, random_rows())
    assert len(actual) == 6
    assert_same(actual, output_and_gradients(block, block, random_rows()))
    assert_graphs()


def test_bfloat16_base():
    block, x = moe_block(adapted("qwen3_moe", dtype=torch.bfloat16)), random_rows(dtype=torch.bfloat16)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)
    actual = output_and_gradients(block, compiled, x)
    assert_same(actual, output_and_gradients(block, block, x), torch.bfloat16)
    assert_graphs()


def test_inference():
    block, backend = moe_block(adapted("qwen3_moe")), AotEagerAndRecordGraphs()
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=False)
    with torch.no_grad():
        error = relative_error(compiled(random_rows()), block(random_rows()))
    assert error <= gradient_budget(torch.float32, inner_size=64)
    assert_graphs()
    assert kt_ops(backend.fw_graphs) == ["moe_fwd"]


def test_switching_adapters_recompiles():
    model = adapted("qwen3_moe", num_hidden_layers=1)
    model.add_adapter("second", model.peft_config["default"])
    randomize(model)
    block = moe_block(model)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)
    outputs = []
    for adapters in (["default"], ["default", "second"]):
        model.base_model.set_adapter(adapters)
        actual = output_and_gradients(block, compiled, random_rows())
        assert_same(actual, output_and_gradients(block, block, random_rows()))
        outputs.append(actual["output"])
    with torch.no_grad(), model.disable_adapter():
        outputs.append(compiled(random_rows()))
        assert relative_error(outputs[-1], block(random_rows())) < gradient_budget(torch.float32, 64)
    for one, other in itertools.combinations(outputs, 2):
        assert relative_error(one, other) > 0.01
    assert_graphs(3)
