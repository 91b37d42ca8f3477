"""open_adapter: opens an adapter and finds the factors in it; and sums of adapters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from ktops.adapters import kt_files, peft_files
from ktops.adapters.base import BaseModel, open_base
from ktops.adapters.config import CONFIG, WEIGHTS, LoraSettings
from ktops.adapters.errors import AdapterError
from ktops.adapters.factors import Factors, rows, stacked, weighted_sum
from ktops.checkpoints.quantization_config import read_json
from ktops.checkpoints.safetensors_file import read_views
from ktops.checkpoints.view import View

HALVES = ("gate", "up")


@dataclass(frozen=True)
class Adapter:
    """The updates of a model's weights.

    Attributes:
        path: the directory; of a sum, that of the first adapter.
        config: its adapter_config.json.
        base: the model.
        weights: the updates of weights other than the experts, by module.
        experts: the updates of experts, by module, then by projection: "gate", "up" and "down", or "gate_up",
            whose rows are those of gate, then those of up.
        others: tensors that are no factors, such as those of modules_to_save, by key.
    """

    path: Path
    config: dict
    base: BaseModel
    weights: dict[str, Factors]
    experts: dict[str, dict[str, Factors]]
    others: dict[str, View]

    def projection(self, module: str, name: str) -> Factors | None:
        """Returns the update of "gate", "up", "down" or "gate_up" of a layer's experts, or None."""
        parts = self.experts[module]
        if name in parts:
            return parts[name]
        size = self.base.experts[module].intermediate_size
        if name in HALVES and "gate_up" in parts:
            begin = HALVES.index(name) * size
            return rows(parts["gate_up"], begin, begin + size)
        if name == "gate_up" and not parts.keys().isdisjoint(HALVES):
            if parts.keys() >= set(HALVES):
                return stacked(parts["gate"], parts["up"])
            (half,) = (half for half in HALVES if half in parts)
            return _among_rows(parts[half], HALVES.index(half) * size, 2 * size)
        return None


def _among_rows(part: Factors, begin: int, count: int) -> Factors:
    """Returns the update of ``count`` rows, of which those from ``begin`` on change."""

    def load() -> tuple[Tensor, Tensor]:
        a, b = part.load()
        whole = b.new_zeros(*b.shape[:-2], count, part.rank)
        whole[..., begin : begin + part.out_features, :] = b
        return a, whole

    return Factors(part.rank, count, part.in_features, part.scaling, part.dtype, load, part.num_experts)


def open_adapter(path: str | Path, base: str | Path | BaseModel | None = None) -> Adapter:
    """Opens an adapter, reading only headers.

    Args:
        path: a directory with adapter_config.json and adapter_model.safetensors from PEFT, with stacked or
            single experts, or fused_expert_lora.safetensors from kt-kernel. If both have the experts, PEFT's
            is read.
        base: directory of the model, or its config.json. Default: the model that adapter_config.json names,
            if it is on this machine.

    Raises:
        AdapterError: the adapter does not fit the model, or is not plain LoRA.
        CheckpointError: a file is missing or damaged; the message names it.

    Example:
        >>> adapter = open_adapter("outputs/checkpoint-200", base="Qwen3-30B-A3B")
        >>> sorted(adapter.experts["model.layers.0.mlp.experts"])
        ['down', 'gate_up']
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder}: expected a directory with {CONFIG}, which gives rank and alpha")
    config = read_json(folder / CONFIG)
    settings = LoraSettings(config, folder / CONFIG)
    model = base if isinstance(base, BaseModel) else open_base(base, folder, config)
    has_fused, has_weights = (folder / kt_files.FUSED).is_file(), (folder / WEIGHTS).is_file()
    if not has_fused and not has_weights:
        raise AdapterError(f"{folder}: expected {WEIGHTS} or {kt_files.FUSED}")
    contents = peft_files.Contents()
    if has_weights:
        views = read_views(folder / WEIGHTS)
        contents = peft_files.read(views, settings, model, config.get("peft_version"))
    if has_fused:
        kt_files.check_manifest(folder)
    if has_fused and not contents.experts:
        contents.experts.update(kt_files.read(read_views(folder / kt_files.FUSED), settings, model))
    if not contents.weights and not contents.experts:
        raise AdapterError(f"{folder}: has no LoRA factors")
    experts = {name: contents.experts[name] for name in model.experts if name in contents.experts}
    return Adapter(folder, config, model, contents.weights, experts, contents.others)


def adapter_paths(given: str | Path | Sequence[str | Path]) -> list[Path]:
    """Returns the directories of one or several adapters.

    Raises:
        AdapterError: there are none.
    """
    paths = [Path(given)] if isinstance(given, str | Path) else [Path(each) for each in given]
    if not paths:
        raise AdapterError("adapters: expected at least one directory")
    return paths


def open_sum(
    paths: Sequence[Path], base: str | Path | None = None, weights: Sequence[float] | None = None
) -> Adapter:
    """Opens adapters of one model, and returns their sum; see :func:`open_adapter` and :func:`combined`."""
    first = open_adapter(paths[0], base)
    return combined([first, *(open_adapter(path, first.base) for path in paths[1:])], weights)


def combined(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """Returns the sum of adapters of one model, each multiplied by its weight; their ranks add up.

    Raises:
        AdapterError: the number of weights is wrong, a weight is 0 or not finite, or several adapters have
            modules_to_save, which cannot be added.
    """
    factors = [1.0] * len(adapters) if weights is None else list(weights)
    if len(factors) != len(adapters):
        raise AdapterError(
            f"weights: expected one for each of the {len(adapters)} adapters, got {len(factors)}"
        )
    if not all(math.isfinite(factor) and factor != 0 for factor in factors):
        raise AdapterError(f"weights: must be finite and not 0, got {factors}")
    first = adapters[0]
    if factors == [1.0]:
        return first
    for adapter in adapters:
        if adapter.others:
            raise AdapterError(
                f"{adapter.path}: has tensors other than LoRA factors, such as {next(iter(adapter.others))}, "
                "which cannot be weighted or added"
            )
    summed = partial(_sum, list(zip(factors, adapters, strict=True)))
    weight_names = dict.fromkeys(name for adapter in adapters for name in adapter.weights)
    experts_names = [
        name for name in first.base.experts if any(name in adapter.experts for adapter in adapters)
    ]
    return Adapter(
        first.path,
        first.config,
        first.base,
        {name: summed(name, None) for name in weight_names},
        {name: _summed_projections(summed, name, adapters) for name in experts_names},
        {},
    )


def _summed_projections(summed, module: str, adapters: Sequence[Adapter]) -> dict[str, Factors]:
    """Adds gate and up separately, unless an adapter has them as one."""
    present = {name for adapter in adapters for name in adapter.experts.get(module, ())}
    names = sorted(present - set(HALVES)) if "gate_up" in present else sorted(present)
    return {name: summed(module, name) for name in names}


def _sum(weighted: Sequence[tuple[float, Adapter]], module: str, projection: str | None) -> Factors:
    parts = []
    for factor, adapter in weighted:
        if projection is None:
            part = adapter.weights.get(module)
        else:
            part = adapter.projection(module, projection) if module in adapter.experts else None
        if part is not None:
            parts.append((factor, part))
    return weighted_sum(parts)
