"""Counts the parameters of a model by part, and the bytes of its weights in memory and on disk."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ktops.checkpoints import Checkpoint, CheckpointError
from ktops.checkpoints.experts import Experts, StoredExperts
from ktops.cli.conversion_plan import plan_conversion
from ktops.cli.errors import UserError
from ktops.cli.finetune.options import Options
from ktops.cli.trained import require_no_adapter
from ktops.cli.weight_format import experts_in_format, open_source
from ktops.formats import get_format
from ktops.formats.plain import PLAIN

EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the name of a tensor of a single expert."""

ROWS = 128
"""Rows of a weight that a format encodes together, at most."""

NATIVE = {"fp8": "fp8_e4m3", "mxfp4": "mxfp4"}
"""quant_method in config.json -> the format in which ktops keeps such experts."""


@dataclass(frozen=True)
class Weights:
    """The weights of a model.

    Attributes:
        architecture: the class of transformers.
        parameters: number of weights of the "experts", of "attention", "embeddings" (and head) and "other".
        experts_format: the format of the experts in memory.
        experts, experts_mapped: bytes of the experts in memory, and how many of them are mapped from files.
        others, others_mapped: the same of all other weights.
        disk: bytes of the files; without files, of files with the weights in these formats.
    """

    architecture: str
    parameters: dict[str, int]
    experts_format: str
    experts: int
    experts_mapped: int
    others: int
    others_mapped: int
    disk: int


def build(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the causal language model of a config, on the meta device, with its experts run by ktops.

    Args:
        path: a model directory, or a config.json.
        dtype: of its weights.

    Raises:
        UserError: transformers or ktops do not know the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    import ktops
    from ktops.integrations.transformers.attention import use_attention

    require_no_adapter(path, "MODEL")
    if not Path(path).is_file() and not (Path(path) / "config.json").is_file():
        raise UserError(f"MODEL: no such file, or no config.json in it: {path}")
    ktops.enable()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="ktops")
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise UserError(f"MODEL: unsupported architecture or broken config.json in {path}: {error}") from None
    use_attention(model)
    return model


def count(model: PreTrainedModel, path: str, options: Options) -> Weights:
    """Counts the weights of a model from :func:`build`.

    Args:
        path: where it was built from. If there are weights, their files say what can be mapped.
        options: of `ktops finetune`, those that say how the weights are loaded.

    Raises:
        UserError: the format cannot hold the experts, or config.json does not say in which one they are.
    """
    dtype = next(parameter.dtype for parameter in model.parameters())
    parameters = _parameters(model)
    experts = _experts(model)
    inside = {id(p) for module in experts.values() for p in module.parameters()}
    others = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
    files = _Files(path, options.experts_path)
    mapped = min(others, files.others_in(dtype))
    if options.linear_format is not None:
        before, after = _linear_bytes(model)
        others += after - before
        mapped = max(0, mapped - before)
    stored = files.experts(options, dtype)
    if stored is None:
        name = options.weight_format or _native(model, dtype)
        size = options.group_size
        nbytes = experts_bytes(model, name, size)
        stored = name, nbytes, 0
    name, nbytes, experts_mapped = stored
    return Weights(
        architecture=type(model).__name__,
        parameters=parameters,
        experts_format=name,
        experts=nbytes + _biases(experts),
        experts_mapped=experts_mapped,
        others=others,
        others_mapped=mapped,
        disk=files.nbytes or others + nbytes,
    )


def converted_bytes(options: Options) -> int | None:
    """Returns the bytes of the tensors that `ktops convert` writes; None without files or a format for it."""
    if options.weight_format is None or options.experts_path is not None:
        return None
    source = _Files(str(options.model), None).own
    if source is None:
        return None
    plan = plan_conversion(source, options.weight_format, options.group_size, options.quantize_method)
    return plan.written


def experts_bytes(model: nn.Module, weight_format: str, group_size: int | None) -> int:
    """Returns the bytes of the experts' matrices in a format.

    Raises:
        UserError: the format cannot hold them.
    """
    from ktops.integrations.loading import PendingExperts

    total = 0
    for module in _experts(model).values():
        sizes = PendingExperts(module)
        rows = sizes.function.rows(sizes.intermediate_size)
        shapes = (rows, sizes.hidden_size), (sizes.hidden_size, sizes.intermediate_size)
        total += sizes.num_experts * sum(_matrix_bytes(weight_format, group_size, *shape) for shape in shapes)
    return total


@functools.cache
def _matrix_bytes(weight_format: str, group_size: int | None, rows: int, columns: int) -> int:
    known = get_format(weight_format)
    try:
        size = known.check_settings(group_size, "rtn")
        row = known.row_elements(columns) * known.dtype.itemsize
    except ValueError as error:
        raise UserError(f"--weight-format {weight_format}: {error}") from None
    if not known.written:
        return rows * row
    codes = known.quantize_reference(torch.ones(ROWS, columns), size, "rtn")
    per_block = sum(tensor.nbytes for tensor in codes if tensor is not None and tensor is not codes.weight)
    return rows * row + -(-rows * per_block // ROWS)


def _experts(model: nn.Module) -> dict[str, nn.Module]:
    from ktops.integrations.loading import experts_modules

    try:
        return experts_modules(model)
    except ValueError as error:
        raise UserError(f"MODEL: {error}") from None


def _biases(experts: dict[str, nn.Module]) -> int:
    return sum(
        parameter.nbytes
        for module in experts.values()
        for name, parameter in module.named_parameters()
        if "bias" in name
    )


def _linear_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Returns the bytes of the linear layers that can be in int8, as they are and in int8."""
    from ktops.integrations.linear_format import linear_layers

    layers = {id(parent._modules[child]): parent._modules[child] for _, parent, child in linear_layers(model)}
    weights = [layer.weight for layer in layers.values() if isinstance(layer, nn.Linear)]
    return sum(w.nbytes for w in weights), sum(w.numel() + w.itemsize * w.shape[0] for w in weights)


def _native(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """Returns the format of the experts that config.json tells of."""
    from ktops.checkpoints.config import quantization_of

    quantization = quantization_of(model.config.to_dict())
    if not quantization:
        return PLAIN[dtype]
    method = quantization.get("quant_method")
    if method not in NATIVE:
        raise UserError(
            f"MODEL: config.json says that the weights are in {method or quantization}, and no files are "
            "there to show their sizes. Name a format: --weight-format"
        )
    return NATIVE[method]


def _parameters(model: PreTrainedModel) -> dict[str, int]:
    """Returns the number of weights by part, each counted once."""
    counts = dict.fromkeys(("experts", "attention", "embeddings", "other"), 0)
    experts = tuple(f"{name}." for name in _experts(model))
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    outside = {id(p) for module in ends if module is not None for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if name.startswith(experts):
            part = "experts"
        elif id(parameter) in outside:
            part = "embeddings"
        else:
            part = "attention" if _is_in_attention(name) else "other"
        counts[part] += parameter.numel()
    return counts


def _is_in_attention(name: str) -> bool:
    modules = (module for module in name.split(".") if "norm" not in module)
    return any("attn" in module or "attention" in module for module in modules)


def _in_format(checkpoint: Checkpoint, options: Options) -> list[Experts]:
    """Returns the projections of all layers in the format of the options, or as they are."""
    if options.weight_format is not None:
        found = experts_in_format(checkpoint, options.weight_format, options.group_size)
        return [experts for _, both in found for experts in both]
    try:
        return [experts for layer in checkpoint.layers for experts in layer.experts()]
    except CheckpointError as error:
        raise UserError(str(error)) from None


class _Files:
    """The files of a model's weights, if there are any."""

    def __init__(self, path: str, experts_path: str | None) -> None:
        folder = Path(path)
        has_weights = folder.is_dir() and any(folder.glob("*.safetensors"))
        self.own = open_source(folder) if has_weights else None
        self.of_experts = self.own if experts_path is None else open_source(experts_path)

    @property
    def nbytes(self) -> int:
        both = {id(part): part for part in (self.own, self.of_experts) if part is not None}
        files = {view.file.path for part in both.values() for view in part.tensors.values()}
        return sum(file.stat().st_size for file in files)

    def others_in(self, dtype: torch.dtype) -> int:
        """Returns the bytes of the tensors outside the experts that are mapped: those of the same dtype."""
        if self.own is None:
            return 0
        return sum(view.nbytes for view in self.own.other_tensors().values() if view.dtype == dtype)

    def experts(self, options: Options, dtype: torch.dtype) -> tuple[str, int, int] | None:
        """Returns their format in memory, bytes, and bytes mapped; None if the files do not have them so."""
        both = [] if self.of_experts is None else _in_format(self.of_experts, options)
        if not both or not all(hasattr(experts, "nbytes") for experts in both):
            return None
        formats = dict.fromkeys(experts.format for experts in both)
        as_stored = options.weight_format is not None or options.mmap
        if not as_stored and set(formats) <= set(PLAIN.values()) - {PLAIN[dtype]}:
            return None
        name = " and ".join(formats)
        nbytes = sum(experts.nbytes for experts in both)
        if options.mmap:
            both = [experts.in_place() for experts in both if isinstance(experts, StoredExperts)]
            return name, nbytes, sum(experts.mapped for experts in both)
        if self._are_stacked(options, formats):
            return name, nbytes, 0
        return name, nbytes, sum(experts.mapped for experts in both)

    def _are_stacked(self, options: Options, formats: Iterable[str]) -> bool:
        """True if transformers loads the experts and copies each into a tensor of all."""
        if options.weight_format is not None or options.experts_path is not None or self.own is None:
            return False
        names = self.own.tensors
        return set(formats) <= set(PLAIN.values()) and any(EXPERT.search(name) for name in names)
