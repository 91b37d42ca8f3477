"""Loads the experts modules of a model from the layers of a checkpoint."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ktops._display import format_bytes, progress
from ktops._warn import warn_once
from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.experts import Experts, Held, Requantized, StoredExperts, float_rows
from ktops.checkpoints.layer import PROJECTIONS, Layer
from ktops.formats import ExpertWeight
from ktops.formats.error import RelativeError
from ktops.formats.expert_weight import COMPUTE_DTYPES
from ktops.integrations.quantization_report import DTYPE_NAMES, QuantizationReport, QuantizedLayer
from ktops.integrations.sharded_experts import ExpertParallel, why_sharded
from ktops.integrations.swap import exchange_stacked, listed_experts, require_experts
from ktops.integrations.transformers.architectures import Unsupported
from ktops.integrations.transformers.outside import describe_replacement
from ktops.nn.expert_list import interception
from ktops.nn.experts import KTExperts
from ktops.nn.layout import Layout
from ktops.ops.activation import ExpertFunction


class PendingExperts(nn.Module):
    """A placeholder for experts that are not loaded yet: knows what they compute but has no weights.

    Attributes:
        num_experts, hidden_size, intermediate_size: as in :class:`ktops.nn.KTExperts`.
        kind: the class of the experts to load.
        options, function: what the experts compute; options are keyword arguments of
            KTExperts.from_parameters.
        post_expert_norm: as in :class:`ktops.nn.KTExperts`.
        is_list: whether it replaces a ModuleList, which the MoE block iterates.
        biased: which of gate_up_proj (or up_proj) and down_proj have a bias.

    The weights also exist as attributes, as meta tensors that are not parameters, because MoE blocks of
    transformers initialize the weights of their experts themselves.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.kind = _kind(experts)
        self.options, self.function = _options(experts), _function(experts)
        self.post_expert_norm = self.options["post_expert_norm"]
        sizes = _sizes(experts)
        if sizes is None:
            raise ValueError(f"KTConfig: cannot infer sizes from the weights of {type(experts).__name__}")
        self.num_experts, self.hidden_size, self.intermediate_size = sizes
        for name, weight in experts.named_parameters(recurse=False):
            setattr(self, name, torch.empty_like(weight, device="meta", requires_grad=False))
        self.is_list = isinstance(experts, nn.ModuleList)
        self.biased = _biased(experts)
        self.train(experts.training)

    def forward(self, *args, **kwargs):
        raise RuntimeError("ktops: the experts are not loaded. Call ktops.load_experts(model, path)")


@dataclass(frozen=True)
class LoadReport:
    """What :func:`ktops.load_experts` loaded.

    Attributes:
        layers: the names of the experts modules, in order.
        formats: (format of gate_up_proj, format of down_proj) -> number of layers that have them.
        schemes: how the checkpoint stores the experts -> number of layers.
        nbytes: size of the experts in bytes.
        mapped: how many of these bytes are memory-mapped from the files of the checkpoint.
        quantization: sizes and errors of the layers that ktops has quantized; None if there are none.
    """

    layers: tuple[str, ...]
    formats: dict[tuple[str, str], int]
    schemes: dict[str, int]
    nbytes: int
    mapped: int
    quantization: QuantizationReport | None = None

    def __str__(self) -> str:
        formats = ", ".join(
            gate_up if gate_up == down else f"{gate_up} with down {down}" for gate_up, down in self.formats
        )
        return (
            f"experts of {len(self.layers)} layers in {formats}: {format_bytes(self.nbytes)}, of which "
            f"{format_bytes(self.mapped)} mapped from the files ({', '.join(self.schemes)})"
        )


def load_layers(
    model: nn.Module,
    modules: dict[str, nn.Module],
    layers: dict[str, Layer],
    options: dict,
    *,
    mmap: bool = False,
    show_progress: bool = True,
    parallel: ExpertParallel | None = None,
) -> LoadReport:
    """Loads every experts module from its layer.

    Args:
        modules: the experts of the model by name.
        layers: the layers of the checkpoint, by the same names.
        options: weight_format, group_size and method, as in :func:`ktops.load_experts`.
        mmap: as there.
        parallel: which of the experts this process loads; default: all.

    Raises:
        CheckpointError, ValueError: as in :func:`ktops.load_experts`.
    """
    dtype, plan = _compute_dtype(model), []
    for name, module in modules.items():
        layer = layers[name].ordered(_function(module).gating)
        _check_fit(layer, name, module)
        try:
            both = layer.experts(**options)
        except CheckpointError:
            raise
        except ValueError as error:
            raise ValueError(f"load_experts: {layer.name}: {error}") from None
        if mmap:
            both = _in_place(layer, both)
        if parallel is not None:
            local = parallel.local_experts(layer.num_experts)
            both = both[0].part(local), both[1].part(local)
        plan.append((name, module, layer, both))
    made = {}
    total = 2 * sum(len(gate_up) for _, _, _, (gate_up, _) in plan)
    with torch.device("cpu"):
        with progress("experts", total, show=show_progress) as step:
            for name, module, layer, both in plan:
                gate_up, down = (experts.read(dtype, step) for experts in both)
                biases = _biases(layer, dtype, parallel)
                made[name] = _kind(module).from_parameters(gate_up, down, *biases, **_options(module))
                made[name].train(module.training)
                if parallel is not None:
                    parallel.install(made[name], layer.num_experts)
        report = _report(plan, made)
    for name, module in modules.items():
        exchange_stacked(model, module, made[name])
    if mmap:
        _warn_if_read(plan)
    return report


def _biases(
    layer: Layer, dtype: torch.dtype, parallel: ExpertParallel | None
) -> Iterator[nn.Parameter | None]:
    """Yields the biases of both projections; None without biases."""
    for key in PROJECTIONS:
        bias = layer.bias(key, dtype)
        if bias is not None and parallel is not None:
            local = parallel.local_experts(layer.num_experts)
            bias = bias[local.start : local.stop].clone()
        yield bias if bias is None else nn.Parameter(bias, requires_grad=False)


def _in_place(layer: Layer, both: tuple[Experts, Experts]) -> tuple[Experts, Experts]:
    for experts in both:
        if not isinstance(experts, StoredExperts):
            raise ValueError(
                f"load_experts: mmap needs experts in the format of the files, but weight_format is "
                f"{experts.format!r} and {layer.name} has {' and '.join(dict.fromkeys(layer.formats))}"
            )
    gate_up, down = (experts.in_place() for experts in both if isinstance(experts, StoredExperts))
    return gate_up, down


def _warn_if_read(plan: list) -> None:
    """Warns of layers that mmap has not mapped."""
    layers = [layer for _, _, layer, both in plan if not all(experts.mapped for experts in both)]
    if layers:
        warn_once(
            f"ktops: mmap: the experts of {len(layers)} of {len(plan)} layers are read into memory instead, "
            f"such as {layers[0].name}. To be mapped, gate and up must follow each other in the file, all "
            "experts of a layer must begin at the same place within a page, and their bytes must be those of "
            "a format. ktops convert writes files that are always mapped"
        )


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the experts modules of a model by name.

    Raises:
        ValueError: the model has none, or ktops cannot load them; the message names the module.
    """
    modules: dict[str, nn.Module] = {
        name: m for name, m in model.named_modules() if isinstance(m, PendingExperts)
    }
    modules = modules or require_experts(model, "load_experts")
    for name, module in modules.items():
        if "base_layer" in name.split("."):
            raise ValueError(f"load_experts: load the experts before adding adapters: {name} has one")
        reason = None
        if not isinstance(module, PendingExperts):
            reason = why_sharded(module) or interception(module)
        if reason is not None:
            raise ValueError(f"load_experts: {name} cannot be replaced: {reason}")
    try:
        functions_of(modules)
    except Unsupported as reason:
        raise ValueError(f"load_experts: {reason}") from None
    return modules


def functions_of(modules: Mapping[str, nn.Module]) -> dict[str, ExpertFunction]:
    """Returns what experts modules compute, by name.

    Raises:
        Unsupported: ktops cannot compute or load one; the message names it.
    """
    functions = {}
    for name, module in modules.items():
        try:
            functions[name] = _function(module)
        except Unsupported as reason:
            what = type(module).__name__
            if isinstance(module, nn.ModuleList):
                what = f"list of {len(module)} modules"
            raise Unsupported(f"ktops cannot load {name}, a {what}: {reason}") from None
    return functions


def _function(module: nn.Module) -> ExpertFunction:
    if isinstance(module, (KTExperts, PendingExperts)):
        return module.function
    if isinstance(module, nn.ModuleList):
        return listed_experts(module, any_device=True)[0].function
    return describe_replacement(module)[1].function


def _kind(module: nn.Module) -> type[KTExperts]:
    """Returns the class of the experts that replace a module."""
    if isinstance(module, PendingExperts):
        return module.kind
    if isinstance(module, KTExperts):
        return type(module)
    return KTExperts if isinstance(module, nn.ModuleList) else describe_replacement(module)[0]


def _layout(module: nn.Module) -> Layout:
    return module.layout if isinstance(module, KTExperts) else describe_replacement(module)[1]


def _options(module: nn.Module) -> dict:
    """Returns what experts compute, as keyword arguments of KTExperts.from_parameters."""
    if isinstance(module, (KTExperts, PendingExperts)):
        return module.options
    return {**_function(module)._asdict(), "post_expert_norm": getattr(module, "post_expert_norm", None)}


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """Returns the first dtype of the model's weights that ktops can compute in; bfloat16 if there is none."""
    return next((p.dtype for p in model.parameters() if p.dtype in COMPUTE_DTYPES), torch.bfloat16)


def _sizes(module: nn.Module) -> tuple[int, int, int] | None:
    """Returns num_experts, hidden_size, intermediate_size; None if the weights do not determine them."""
    if isinstance(module, (KTExperts, PendingExperts)):
        return module.num_experts, module.hidden_size, module.intermediate_size
    if isinstance(module, nn.ModuleList):
        _, down = _projections(module)
        return len(module), down.out_features, down.in_features
    weight = module._parameters.get("down_proj")
    if weight is None or weight.dim() != 3 or weight.dtype in (torch.uint8, torch.int8):
        return None
    num_experts, rows, columns = weight.shape
    if _layout(module).transposed:
        rows, columns = columns, rows
    return num_experts, rows, columns


def _projections(experts: nn.ModuleList) -> tuple[nn.Linear, nn.Linear]:
    """Returns the first and the down projection of the first expert of a list."""
    projections = listed_experts(experts, any_device=True)[0].projections()
    return projections[0], projections[-1]


def _check_fit(layer: Layer, name: str, module: nn.Module) -> None:
    layer.check()
    expected, got = _sizes(module), (layer.num_experts, layer.hidden_size, layer.intermediate_size)
    if expected is not None and got != expected:
        raise CheckpointError(
            f"{layer.tensors[0]}: {name} of the model has [num_experts, hidden_size, intermediate_size] = "
            f"{list(expected)}, the checkpoint {list(got)}"
        )
    biased = _biased(module)
    for projection in PROJECTIONS:
        in_model, in_file = projection in biased, layer.has_bias(projection)
        if in_model != in_file:
            raise CheckpointError(
                f"{layer.tensors[0]}: {projection} of {name} has {'a' if in_model else 'no'} bias in the "
                f"model, but {'a' if in_file else 'no'} bias in the checkpoint"
            )


def _biased(module: nn.Module) -> list[str]:
    """Returns which of the two projections of an experts module have a bias."""
    if isinstance(module, PendingExperts):
        return module.biased
    if isinstance(module, nn.ModuleList):
        biases: tuple = tuple(projection.bias for projection in _projections(module))
    else:
        biases = _layout(module).biases(module)
    return [name for name, bias in zip(PROJECTIONS, biases, strict=True) if bias is not None]


def _report(plan: list, made: dict[str, KTExperts]) -> LoadReport:
    formats: dict[tuple[str, str], int] = {}
    schemes: dict[str, int] = {}
    nbytes = mapped = 0
    for name, _, layer, both in plan:
        experts = made[name]
        pair = both[0].format, both[1].format
        formats[pair] = formats.get(pair, 0) + 1
        schemes[layer.scheme] = schemes.get(layer.scheme, 0) + 1
        nbytes += sum(weight.nbytes for weight in experts.layout.weights(experts))
        mapped += sum(experts.mapped for experts in both)
    return LoadReport(tuple(made), formats, schemes, nbytes, mapped, _quantization(plan, made))


def _quantization(plan: list, made: dict[str, KTExperts]) -> QuantizationReport | None:
    """Returns the report on the layers that were quantized while loading, with the errors of one expert."""
    found = [(name, both) for name, _, _, both in plan if any(isinstance(e, Requantized) for e in both)]
    if not found:
        return None
    layers = []
    for name, both in found:
        weights = made[name].layout.weights(made[name])
        gate_up_error, down_error = (_error_of_first(*pair) for pair in zip(both, weights, strict=True))
        before = sum(weight.shape.numel() * weight.dtype.itemsize for weight in weights)
        after = sum(weight.nbytes for weight in weights)
        layers.append(QuantizedLayer(name, gate_up_error, down_error, before, after))
    first = next(experts for experts in found[0][1] if isinstance(experts, Requantized))
    return QuantizationReport(
        first.format, first.group_size, first.method, DTYPE_NAMES[weights[0].dtype], tuple(layers)
    )


def _error_of_first(experts: Experts, made: Tensor | ExpertWeight) -> float:
    """Returns the :class:`RelativeError` of the first expert of a projection."""
    error = RelativeError()
    if isinstance(experts, Requantized) and isinstance(made, ExpertWeight):
        for actual, expected in zip(float_rows(Held(made), 0), float_rows(experts.source, 0), strict=True):
            error.add(actual, expected)
    return error.value
