"""quantize_experts: converts a model's experts to a weight format, layer by layer, in place."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ktops._display import progress
from ktops.formats import ExpertWeight, get_format, quantize
from ktops.formats.error import relative_error
from ktops.formats.plain import PLAIN
from ktops.integrations import peft
from ktops.integrations.quantization_report import DTYPE_NAMES, QuantizationReport, QuantizedLayer
from ktops.integrations.swap import (
    Unsupported,
    exchange_stacked,
    listed_experts,
    require_experts,
    require_plain,
    stacked_experts,
)
from ktops.integrations.transformers.saving import enable_saving
from ktops.nn.expert_list import stacked_copy
from ktops.nn.experts import KTExperts


@torch.no_grad()
def quantize_experts(
    model: nn.Module,
    weight_format: str,
    *,
    group_size: int | None = None,
    method: str = "rtn",
    show_progress: bool = True,
) -> QuantizationReport:
    """Converts the weights of a model's experts to a weight format, in place.

    Every experts module with stacked ``gate_up_proj`` (or ``up_proj``) and ``down_proj``, including
    :class:`ktops.nn.KTExperts`, becomes a KTExperts whose weights are :class:`ktops.ExpertWeight`. A
    ModuleList of MLPs that :func:`ktops.swap_experts` supports becomes a
    :class:`ktops.nn.KTExpertSequence` of such experts, which the MoE block can iterate. Routers, shared
    experts and biases are unchanged. All layers are checked first and then quantized one by one. Each
    layer's dense weights are freed before the next layer, unless the caller holds a reference to them. Add
    adapters afterward as usual; LoRA then trains on top of the quantized weights.

    Args:
        model: on the CPU, with experts in bfloat16, float16, float32 or float64, or in the formats bf16, fp16
            or fp32, and without adapters on them.
        weight_format, group_size, method: see :func:`ktops.quantize`.
        show_progress: show a bar in a terminal, or a line every ten seconds elsewhere.

    Returns:
        A :class:`QuantizationReport` with the errors and sizes of every layer. Its str() is a summary.

    Raises:
        ValueError: the model has no experts, the op does not support them, the format cannot hold them, or
            their weights are not finite; or the format, method or group size is unknown. The message names
            the layers and reasons; the model is unchanged.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16")
        >>> print(ktops.quantize_experts(model, "int4", group_size=128, method="mse"))
        experts: 12.3 MiB in int4, group 128 (bf16: 47.6 MiB, 3.88 times smaller), relative error 0.093
    """
    found = require_experts(model, "quantize_experts")
    dense, refused = {}, []
    for name, module in found.items():
        try:
            dense[name] = _dense_experts(name, module)
            _require_quantizable(dense[name], weight_format, group_size, method)
        except Unsupported as reason:
            refused.append(f"{name}: {reason}")
    if refused:
        raise ValueError(
            f"quantize_experts: {len(refused)} of {len(found)} experts modules of {type(model).__name__} "
            f"cannot be quantized: {'; '.join(refused)}"
        )
    layers = []
    dtype = DTYPE_NAMES[next(iter(dense.values())).down[0].dtype]
    with progress(f"experts to {weight_format}", len(found), show=show_progress) as step:
        for name in list(found):
            stacked = dense.pop(name).stacked()
            quantized, layer = _quantize_layer(name, stacked, weight_format, group_size, method)
            del stacked
            exchange_stacked(model, found.pop(name), quantized)
            layers.append(layer)
            step(1)
    peft.enable_if_installed()
    enable_saving(model)
    size = get_format(weight_format).check_settings(group_size, method)
    return QuantizationReport(weight_format, size, method, dtype, tuple(layers))


@dataclass(frozen=True)
class _Dense:
    """Experts to quantize: lists of their weight matrices, and a function that returns them as KTExperts."""

    gate_up: list[Tensor]
    down: list[Tensor]
    stacked: Callable[[], KTExperts]


def _dense_experts(name: str, module: nn.Module) -> _Dense:
    if "base_layer" in name.split("."):
        raise Unsupported("it has adapters: quantize first, then add adapters")
    if isinstance(module, nn.ModuleList):
        experts = listed_experts(module)
        rows = [[each.weight for each in expert.projections()] for expert in experts]
        gate_up = [weight for row in rows for weight in row[:-1]]
        return _Dense(gate_up, [row[-1] for row in rows], partial(stacked_copy, experts))
    if isinstance(module, KTExperts):
        require_plain(module)
    else:
        module = stacked_experts(module, "activations")
    weights = module.layout.weights(module)
    in_format = [weight for weight in weights if isinstance(weight, ExpertWeight)]
    quantized = [weight for weight in in_format if weight.format not in PLAIN.values()]
    if quantized:
        raise Unsupported(f"its weights are already in format {quantized[0].format!r}")
    tensors = [weight.weight if isinstance(weight, ExpertWeight) else weight for weight in weights]
    stacked = partial(_with_parameters, module) if in_format else lambda: module
    return _Dense(list(tensors[0]), list(tensors[1]), stacked)


def _with_parameters(experts: KTExperts) -> KTExperts:
    """Converts experts in a plain format to experts with Parameters, in the dtype they compute in."""
    gate_up, down = map(_dequantized, experts.layout.weights(experts))
    dense = type(experts).from_parameters(
        nn.Parameter(gate_up, requires_grad=False),
        nn.Parameter(down, requires_grad=False),
        *experts.layout.biases(experts),
        **experts.options,
    )
    return dense.train(experts.training)


def _dequantized(weight: Tensor | ExpertWeight) -> Tensor:
    if not isinstance(weight, ExpertWeight):
        return weight
    return weight.weight if weight.weight.dtype == weight.dtype else weight.dequantize()


def _require_quantizable(experts: _Dense, weight_format: str, group_size: int | None, method: str) -> None:
    for name, weights in (("gate_up_proj", experts.gate_up), ("down_proj", experts.down)):
        if weights[0].device.type != "cpu":
            raise Unsupported(f"{name} is on {weights[0].device.type}")
        extremes = torch.stack([value for weight in weights for value in weight.aminmax()]).aminmax()
        if not all(bool(value.isfinite()) for value in extremes):
            raise Unsupported(f"{name} has values that are not finite")
        columns = weights[0].shape[-1]
        widest = torch.stack(extremes).repeat(columns)[None, None, :columns]
        try:
            quantize(widest, weight_format, group_size=group_size, method=method)
        except ValueError as error:
            raise Unsupported(f"{name}: {error}") from None


def _quantize_layer(
    name: str, dense: KTExperts, weight_format: str, group_size: int | None, method: str
) -> tuple[KTExperts, QuantizedLayer]:
    weights = dense.layout.weights(dense)
    (gate_up, gate_up_error), (down, down_error) = (
        _quantize(weight, weight_format, group_size, method) for weight in weights
    )
    experts = type(dense).from_parameters(
        gate_up,
        down,
        *dense.layout.biases(dense),
        **dense.options,
    )
    before = sum(weight.nbytes for weight in weights)
    layer = QuantizedLayer(name, gate_up_error, down_error, before, gate_up.nbytes + down.nbytes)
    return experts.train(dense.training), layer


def _quantize(
    dense: Tensor | ExpertWeight, weight_format: str, group_size: int | None, method: str
) -> tuple[ExpertWeight, float]:
    assert isinstance(dense, Tensor)
    weight = quantize(dense, weight_format, group_size=group_size, method=method)
    return weight, relative_error(weight, dense)
