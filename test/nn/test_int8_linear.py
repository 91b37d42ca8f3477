"""Int8Linear against products with the weights that its codes stand for, in float64."""

import copy

import pytest
import torch
from torch import nn

from ktops.nn import Int8Linear
from ktops.testing.budgets import forward_budget, gradient_budget, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(
    dtype: torch.dtype = torch.bfloat16, sizes=(160, 70), bias: bool = False
) -> tuple[nn.Linear, Int8Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(*sizes, bias=bias, dtype=dtype)
    return linear, Int8Linear.from_linear(linear)


def exact(layer: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    product = x.double() @ (layer.qweight.double() * layer.scale.double()[:, None]).T
    return product if layer.bias is None else product + layer.bias.double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (7,), (8,), (2, 3, 5), (0,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradient(dtype, shape, bias):
    _, layer = make(dtype, bias=bias)
    x = torch.randn(*shape, 160, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        output = layer(x)
    assert output.shape == (*shape, 70) and output.dtype == dtype
    assert relative_error(output, exact(layer, x)) <= 2 * forward_budget(dtype)
    trained = layer(x)
    assert relative_error(trained, exact(layer, x)) <= 2 * forward_budget(dtype)
    grad = torch.randn_like(trained)
    trained.backward(grad)
    expected = torch.autograd.grad(exact(layer, x), x, grad.double())[0]
    assert relative_error(x.grad, expected) <= 2 * gradient_budget(dtype, inner_size=160)


def test_weights_larger_than_a_chunk():
    _, layer = make(sizes=(2048, 2100))
    x = torch.randn(9, 2048, dtype=torch.bfloat16, requires_grad=True)
    output = layer(x)
    assert relative_error(output, exact(layer, x)) <= 2 * forward_budget(torch.bfloat16)
    output.sum().backward()
    expected = torch.autograd.grad(exact(layer, x).sum(), x)[0]
    assert relative_error(x.grad, expected) <= 2 * gradient_budget(torch.bfloat16, inner_size=2048)


def test_codes_are_those_of_the_format():
    """A code is at most half a step off, and the largest weight of a row has the largest code."""
    linear, layer = make(torch.float32)
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert bool(((layer.dequantize() - linear.weight).abs() <= step * 0.501).all())
    assert layer.qweight.abs().amax(1).eq(127).all()


def test_is_a_module():
    _, layer = make(bias=True)
    x = torch.randn(3, 160, dtype=torch.bfloat16)
    other = Int8Linear(
        torch.zeros_like(layer.qweight), torch.zeros_like(layer.scale), copy.deepcopy(layer.bias)
    )
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer.float()(x.float()).dtype == torch.float32 and layer.qweight.dtype == torch.int8
    assert layer(x).dtype == torch.bfloat16
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_there_is_no_weight_to_mistake_for_codes():
    _, layer = make()
    assert layer.weight is None
    with pytest.raises(TypeError, match="Int8Linear: weights in int8 are frozen"):
        layer.reset_parameters()


def test_errors():
    with pytest.raises(ValueError, match="Int8Linear: in_features must be a multiple of 16, got 20"):
        Int8Linear.from_linear(nn.Linear(20, 4))
    linear = nn.Linear(32, 4)
    linear.weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="Int8Linear: weight must be finite, got NaN or infinity"):
        Int8Linear.from_linear(linear)
    linear.weight = nn.Parameter(torch.zeros(4, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"Int8Linear: weight must have a floating-point dtype, got torch\.int8"
    ):
        Int8Linear.from_linear(linear)


@pytest.mark.parametrize("rows", [1, 9])
def test_compiled(rows):
    _, layer = make()
    x = torch.randn(rows, 160, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        assert relative_error(compiled, exact(layer, x)) <= 2 * forward_budget(torch.bfloat16)
