"""quantize_linear: converts a model's linear layers outside the experts to int8, in place."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ktops._display import format_bytes
from ktops.integrations import data_parallel
from ktops.integrations.swap import exchange
from ktops.integrations.transformers.saving import refuse_saving
from ktops.nn.experts import check_name
from ktops.nn.find import find_experts, without_base_layer
from ktops.nn.int8_linear import COLUMNS, Int8Linear

LINEAR_FORMATS = ("int8",)

_KEPT = re.compile(r"(^|_)(gate|router)$|^kv_b_proj$")
"""Names of linear layers that stay as they are. Routers are small, and rounding could change their choice;
latent attention multiplies by the transpose of kv_b_proj when it decodes."""


@dataclass(frozen=True)
class LinearReport:
    """What :func:`quantize_linear` has converted; ``str()`` summarizes it in one line.

    Attributes:
        linear_format: as requested.
        layers: the names of the converted layers, in model order.
        bytes_before, bytes_after: size of their weights.
    """

    linear_format: str
    layers: tuple[str, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"{len(self.layers)} linear layers: {format_bytes(self.bytes_after)} in {self.linear_format} "
            f"(before: {format_bytes(self.bytes_before)})"
        )


def quantize_linear(model: nn.Module, linear_format: str = "int8") -> LinearReport:
    """Converts the linear layers of attention, dense MLPs, shared experts and the head, in place.

    Each becomes a :class:`ktops.nn.Int8Linear`, whose weights are frozen, one after another, so that only one
    is in memory twice. Routed experts, routers, embeddings, the ``kv_b_proj`` of latent attention, and layers
    with rows of no multiple of 16 weights stay as they are, and so do adapters of PEFT; new adapters can be
    added before or after. A head that shares the weights of the embeddings gets its own, in int8. Afterward,
    ``save_pretrained`` of the model raises ValueError; its adapters can be saved.

    Args:
        model: a causal language model or any other module.
        linear_format: "int8".

    Returns:
        A :class:`LinearReport`.

    Raises:
        ValueError: unknown linear_format, or a weight is NaN or infinite. Nothing is changed then.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        >>> print(ktops.quantize_linear(model, "int8"))
        217 linear layers: 1.0 GiB in int8 (before: 2.0 GiB)
    """
    check_name("quantize_linear", "linear_format", linear_format, LINEAR_FORMATS)
    found = list(linear_layers(model))
    for name, parent, child in found:
        try:
            Int8Linear.check(_linear(parent, child))
        except (ValueError, TypeError) as error:
            raise type(error)(f"quantize_linear: {name}: {error}") from None
    layers, before, after = [], 0, 0
    for name, parent, child in found:
        linear = _linear(parent, child)
        if isinstance(linear, Int8Linear):  # a child of several modules, which all have it by now
            continue
        converted = Int8Linear.from_linear(linear)
        before += linear.weight.nbytes
        after += converted.qweight.nbytes + converted.scale.nbytes
        layers.append(name)
        exchange(model, linear, converted)
    refuse_saving(model)
    data_parallel.enable()
    return LinearReport(linear_format, tuple(layers), before, after)


def _linear(parent: nn.Module, name: str) -> nn.Linear:
    linear = parent._modules[name]
    assert isinstance(linear, nn.Linear)
    return linear


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields (name, parent, name in the parent) of the layers to convert."""
    experts = tuple(f"{name}." for name in find_experts(model))
    adapters: tuple[str, ...] = ()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if hasattr(module, "adapter_layer_names"):  # a layer of PEFT's
            adapters += tuple(f"{prefix}{part}." for part in module.adapter_layer_names)
        if f"{name}.".startswith(experts) or f"{name}.".startswith(adapters):
            continue
        for child, layer in module._modules.items():
            own_name = without_base_layer(prefix + child).rpartition(".")[2]
            if type(layer) is nn.Linear and not layer.in_features % COLUMNS and not _KEPT.search(own_name):
                yield prefix + child, module, child
