"""LoRA on linear layers in the dtype of their input, against explicit products and PEFT's own forward."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ktops.integrations.lora_linear import adapters_in_input_dtype
from ktops.testing.budgets import model_budget, relative_error

TOKENS, INPUTS, OUTPUTS, RANK, SCALING = 24, 48, 40, 4, 2.0
BUDGET = model_budget(torch.bfloat16, INPUTS, 4)
"""The result of the layer, of A and of B are rounded, and their sum or gradient."""


def layers(dtype=torch.bfloat16, bias: bool = False, dropout: float = 0.0, **kwargs):
    """Returns a model of two adapted linear layers with the same input, whose adapters are float32."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(INPUTS, OUTPUTS, bias=bias) for name in ("q", "k")}).to(dtype)
    config = LoraConfig(
        r=RANK, lora_alpha=SCALING * RANK, target_modules=["q", "k"], lora_dropout=dropout, **kwargs
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model.train()


def inputs(dtype=torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, TOKENS // 2, INPUTS, generator=generator).to(dtype).requires_grad_()


def step(model, x: torch.Tensor) -> list[torch.Tensor]:
    """Returns the results of both layers, and the gradients of input and adapters."""
    results = [model.base_model.model[name](x) for name in ("q", "k")]
    grad = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [*results, *torch.autograd.grad(results, [x, *trained], [grad, grad])]


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for left, right in zip(actual, expected, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@pytest.mark.parametrize("bias", [False, True])
def test_equals_explicit_products(bias):
    """In float64, of the same weights; gradients of adapters are float32."""
    model, exact = layers(bias=bias), layers(bias=bias).double()
    x = inputs()
    with adapters_in_input_dtype(model):
        actual = step(model, x)
    for name, result in zip(("q", "k"), actual[:2], strict=True):
        layer = exact.base_model.model[name]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rows = x.detach().double()
        explicit = rows @ (layer.base_layer.weight + SCALING * b @ a).mT + (
            layer.base_layer.bias if bias else 0
        )
        assert relative_error(result, explicit) <= BUDGET
    with torch.autocast("cpu", enabled=False):
        expected = step(exact, x.detach().double().requires_grad_())
    assert all(gradient.dtype == torch.float32 for gradient in actual[3:])
    for left, right in zip(actual, expected, strict=True):
        assert relative_error(left, right) <= BUDGET


def test_saves_no_copy_of_the_input():
    model, x = layers(), inputs()
    held = {tensor.data_ptr() for tensor in (x, *model.parameters())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.data_ptr() in held or tensor.numel() <= TOKENS * RANK
        return tensor

    with (
        adapters_in_input_dtype(model),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        step(model, x)


def test_frozen_input():
    """The first layer of a model has no gradient to its input."""
    model, x = layers(), inputs().detach()
    with adapters_in_input_dtype(model):
        model.base_model.model["q"](x).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".q.lora_" in n)


def test_two_adapters():
    model, x = layers(), inputs()
    model.add_adapter(
        "other", LoraConfig(r=2, lora_alpha=3, target_modules=["q", "k"], init_lora_weights=False)
    )
    model.base_model.set_adapter(["default", "other"])
    expected = step(copy.deepcopy(model).double(), x.detach().double().requires_grad_())
    with adapters_in_input_dtype(model):
        actual = step(model, x)
    for left, right in zip(actual, expected, strict=True):
        assert relative_error(left, right) <= BUDGET


def test_dropout_is_of_the_adapter_only():
    model, x = layers(dropout=1 - 1e-7), inputs()
    with adapters_in_input_dtype(model):
        result = model.base_model.model["q"](x)
    assert torch.equal(result, model.base_model.model["q"].base_layer(x))


@pytest.mark.parametrize(
    "kind", ["eval", "float32", "bfloat16 adapters", "dora", "bias", "disabled", "merged"]
)
def test_other_layers_are_those_of_peft(kind):
    """Bit for bit."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model, x = layers(dtype, use_dora=kind == "dora", lora_bias=kind == "bias"), inputs(dtype)
    model.train(kind != "eval")
    if kind == "bfloat16 adapters":
        model.to(torch.bfloat16)
    if kind == "merged":
        model.merge_adapter()
    if kind == "disabled":
        model.base_model.disable_adapter_layers()

    def run() -> list[torch.Tensor]:
        return [model.base_model.model["q"](x)] if kind in ("disabled", "merged") else step(model, x)

    expected = run()
    with adapters_in_input_dtype(model):
        assert_equal(run(), expected)


def test_peft_computes_again_afterward():
    model, x = layers(), inputs()
    expected = step(model, x)
    with adapters_in_input_dtype(model):
        assert not torch.equal(step(model, x)[0], expected[0])
    assert_equal(step(model, x), expected)
