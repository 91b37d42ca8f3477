"""LoRA on linear layers in training, computed in the dtype of their input."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ktops.integrations.peft import lora_of_linear
from ktops.integrations.replacements import replaced_in


@contextmanager
def adapters_in_input_dtype(model: nn.Module) -> Iterator[None]:
    """Makes LoRA on linear layers round float32 adapters to bfloat16 where the layers' inputs are bfloat16.

    PEFT keeps the adapters of a model in bfloat16 in float32. In every call it copies the input to float32,
    which autograd saves once for each layer that reads it, and adds float32 matrices as large as the output.
    Here, as in the experts' adapters and in PyTorch's autocast, products have bfloat16 operands and float32
    sums. The adapters stay float32, and no copy of the input is saved.

    Only layers in training mode compute like this, so evaluation is not affected. Layers whose adapters have
    a bias or are no plain LoRA keep PEFT's forward.

    Args:
        model: a model with LoRA adapters of PEFT.

    Example:
        >>> with adapters_in_input_dtype(model):
        ...     trainer.train()
    """
    from peft.tuners.lora.layer import Linear

    layers = [m for m in model.modules() if type(m) is Linear and "forward" not in m.__dict__]
    with replaced_in(layers, "forward", _forward):
        yield


def _forward(layer: Any, x: Tensor, *args, **kwargs) -> Tensor:
    names = lora_of_linear(layer)
    if args or kwargs or not names or not _is_computed(layer, x, names):
        return type(layer).forward(layer, x, *args, **kwargs)
    result = layer.base_layer(x)
    for name in names:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        result = _AddLora.apply(result, layer.lora_dropout[name](x), a, b, layer.scaling[name])
    return result


def _is_computed(layer: Any, x: Tensor, names: list[str]) -> bool:
    return (
        layer.training
        and x.dtype == torch.bfloat16
        and not torch.is_autocast_enabled(x.device.type)
        and all(layer.lora_A[name].weight.dtype == torch.float32 for name in names)
        and all(layer.lora_B[name].bias is None for name in names)
    )


class _AddLora(torch.autograd.Function):
    """result + scaling (x A^T) B^T, for result [..., N], x [..., K], A [r, K] and B [N, r]."""

    @staticmethod
    def forward(ctx, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        inner = x.flatten(0, -2) @ a.to(x.dtype).t()
        ctx.save_for_backward(x, inner, a, b)
        ctx.scaling = scaling
        rows = result.flatten(0, -2)
        return torch.addmm(rows, inner, b.to(x.dtype).t(), alpha=scaling).view(result.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, inner, a, b = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_inner = rows @ b.to(x.dtype) * ctx.scaling
        grad_x = (grad_inner @ a.to(x.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
        grad_a = (grad_inner.t() @ x.flatten(0, -2)).to(a.dtype)
        grad_b = (rows.t() @ (inner * ctx.scaling)).to(b.dtype)
        return grad, grad_x, grad_a, grad_b, None
