"""LoRA as a part of experts and linear layers, for inference, and LoRA that cannot be passed as arguments."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

FROZEN_LORA = "frozen_lora"
"""The child of an experts module that holds a FrozenLora."""

_PASSED = "_passed_lora"
"""The attribute of an experts module that holds the LoRA arguments of the call in progress."""


class FrozenLora(nn.Module):
    """LoRA factors that experts apply in every call.

    PEFT stores B with the expert innermost, so that the operator reads a cache line for each number if it
    computes one token. Here, the columns of an expert's B lie one after another, and so do the rows of its A.
    Factors that are stored otherwise are copied.

    Args:
        lora: the LoRA arguments of :func:`ktops.moe_sft`: gate_up_lora_A, gate_up_scaling, ...

    Example:
        >>> experts.add_module(FROZEN_LORA, FrozenLora({"down_lora_A": a, "down_lora_B": b}))
    """

    def __init__(self, lora: dict[str, Any]) -> None:
        super().__init__()
        self.scalings: dict[str, float] = {}
        for name, value in lora.items():
            if not isinstance(value, Tensor):
                self.scalings[name] = value
            elif name.endswith("_B"):
                self.register_buffer(name, value.detach().mT.contiguous().mT)
            else:
                self.register_buffer(name, value.detach().contiguous())

    def arguments(self) -> dict[str, Any]:
        """Returns the LoRA arguments of :func:`ktops.moe_sft`."""
        return {**self._buffers, **self.scalings}


@contextmanager
def passing_lora(experts: nn.Module, lora: dict[str, Any]) -> Iterator[None]:
    """Gives an experts module the LoRA arguments of the calls in the block.

    For experts whose forward another library replaced with one that takes only tokens and routes.
    """
    experts.__dict__[_PASSED] = lora
    try:
        yield
    finally:
        del experts.__dict__[_PASSED]


def lora_arguments(experts: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the LoRA arguments of a call to an experts module: those given or passed, or its frozen ones.

    Raises:
        ValueError: there are both.
    """
    given = given or experts.__dict__.get(_PASSED, given)
    frozen: Any = experts._modules.get(FROZEN_LORA)
    if frozen is None:
        return given
    if given:
        raise ValueError(f"{type(experts).__name__}: experts with a frozen adapter cannot have another one")
    return frozen.arguments()


class FrozenLoraLinear(nn.Module):
    """A linear layer with LoRA: computes what PEFT's layer computes, in fewer steps.

    Args:
        base_layer: [..., in] -> [..., out].
        lora_A, lora_B: [r, in] and [out, r], in the dtype to multiply them in.
        scaling: factor of their product.

    Example:
        >>> layer = FrozenLoraLinear(nn.Linear(64, 32), torch.randn(4, 64), torch.randn(32, 4), 2.0)
        >>> layer(torch.randn(3, 64)).shape
        torch.Size([3, 32])
    """

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, base_layer: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.base_layer, self.scaling = base_layer, scaling
        self.register_buffer("lora_A", lora_A.detach())
        self.register_buffer("lora_B", lora_B.detach())

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer, as PEFT's layers have it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer."""
        return self.base_layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """Returns [..., out] in the dtype of the base layer's result."""
        product = self.base_layer(input)
        delta = linear(linear(input.to(self.lora_A.dtype), self.lora_A), self.lora_B).mul_(self.scaling)
        return (product + delta).to(product.dtype)
