"""kt-kernel's fused_expert_lora.safetensors in bfloat16, PEFT's file next to it, and the manifest of both."""

import json
from functools import partial
from pathlib import Path

import torch

from ktops.adapters.adapter import Adapter
from ktops.adapters.config import CONFIG, WEIGHTS
from ktops.adapters.errors import AdapterError
from ktops.adapters.factors import PROJECTIONS, Factors
from ktops.adapters.kt_files import FUSED, MANIFEST, factor_key, make_manifest
from ktops.adapters.layouts.plan import (
    Named,
    Piece,
    Plan,
    Scale,
    config_for,
    left_out,
    other_weights,
    parts_of_experts,
    projections,
)
from ktops.checkpoints.names import layer_number
from ktops.ops.activation import UNGATED


def plan(adapter: Adapter) -> Plan:
    """Plans files for kt-kernel.

    Raises:
        AdapterError: there are no adapters on experts, the experts have no gate, or two layers have the
            same number.
    """
    if not adapter.experts:
        raise AdapterError(f"{adapter.path}: has no adapters on experts, which are what {FUSED} holds")
    layers = {module: _layer(adapter, module) for module in adapter.experts}
    parts = list(parts_of_experts(adapter))
    scale = Scale.of([*adapter.weights.values(), *parts])
    pieces = [
        _of_experts(layer, name, part, scale)
        for module, layer in layers.items()
        for name, part in projections(adapter, module, PROJECTIONS, scale.rank).items()
    ]
    others = list(other_weights(adapter, scale, published=False))
    targets = {name.rpartition(".")[2] for name in adapter.weights}
    config = config_for(adapter, scale, targets)
    notes = left_out(adapter, "kt-kernel")
    if any(torch.bfloat16 not in (part.dtype, part.scaled_dtypes(scale.scaling)[1]) for part in parts):
        notes.append("kt-kernel reads the adapters of experts in bfloat16, so they are rounded")
    return Plan({WEIGHTS: others, FUSED: pieces}, config, notes, partial(_write_manifest, config=config))


def _layer(adapter: Adapter, module: str) -> int:
    layer = layer_number(module)
    if layer is None:
        raise AdapterError(f"{adapter.path}: kt-kernel numbers layers, but {module} is in none with a number")
    if adapter.base.by_layer[layer] != [module]:
        raise AdapterError(
            f"{adapter.path}: kt-kernel numbers layers, but {layer} means several of this model"
        )
    if adapter.base.experts[module].gating == UNGATED:
        raise AdapterError(f"{adapter.path}: kt-kernel needs experts with a gate; {module} has none")
    return layer


def _of_experts(layer: int, name: str, part: Factors, scale: Scale) -> Piece:
    assert part.num_experts is not None
    names = tuple(factor_key(layer, f"{name}_lora_{factor}") for factor in "ab")
    shapes = (
        (part.num_experts, scale.rank, part.in_features),
        (part.num_experts, part.out_features, scale.rank),
    )
    kinds = {each: (torch.bfloat16, shape) for each, shape in zip(names, shapes, strict=True)}
    return Piece(kinds, partial(_make, names, part, scale))


def _make(names: tuple[str, ...], part: Factors, scale: Scale) -> Named:
    for name, tensor in zip(names, part.scaled(scale.rank, scale.scaling), strict=True):
        yield name, tensor.to(torch.bfloat16)


def _write_manifest(folder: Path, pieces: dict[str, list[Piece]], config: dict) -> None:
    kinds = {name: kind for piece in pieces[FUSED] for name, kind in piece.kinds.items()}
    manifest = make_manifest(
        folder,
        (CONFIG, WEIGHTS),
        kinds,
        weight_format="bf16",
        base=config["base_model_name_or_path"],
        rank=config["r"],
        alpha=config["lora_alpha"],
    )
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
