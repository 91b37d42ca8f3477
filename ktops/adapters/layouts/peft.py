"""PEFT's stacked factors, A [r E, in] and B [out, r E], as PEFT 0.19.1 and later read them."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ktops.adapters.adapter import Adapter
from ktops.adapters.base import Stacks
from ktops.adapters.config import WEIGHTS
from ktops.adapters.factors import Factors
from ktops.adapters.layouts.plan import (
    Named,
    Piece,
    Plan,
    Scale,
    config_for,
    factor_names,
    left_out,
    matrix,
    other_weights,
    projections,
    whole,
)
from ktops.ops.activation import INTERLEAVED

WRITTEN_FOR = "0.19.1"
"""The version of PEFT that the files seem to come from."""

_OTHERS = ("modules_to_save", "trainable_token_indices")
"""The options by which PEFT trains, and loads, other tensors than factors."""

_CONVERTED = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Names that PEFT takes for projections of experts if they are in target_modules."""


def plan(adapter: Adapter) -> Plan:
    """Plans files for PEFT, with the rank and the alpha of every weight unchanged."""
    pieces, modules, parameters = list[Piece](), dict[str, Factors](), dict[str, Factors]()
    for name, part in adapter.weights.items():
        pieces.append(matrix(name, part, _own(part), embedding=name in adapter.base.embeddings))
        is_module = name in adapter.base.linears or name in adapter.base.embeddings
        if not is_module or name.rpartition(".")[2] in _CONVERTED:
            parameters[f"{name}.weight"] = part
        else:
            modules[name] = part
    for module, parameter, key, part in _stacked(adapter):
        pieces.append(_of_experts(key, part, adapter.base.experts[module], _own(part)))
        parameters[f"{module}.{parameter}"] = part
    pieces += [whole(name, view) for name, view in adapter.others.items()]
    every = modules | parameters
    common = Counter(map(_own, every.values())).most_common(1)[0][0]
    exceptions = _by_suffix(
        {name: own for name, part in every.items() if (own := _own(part)) != common}, every
    )
    config = config_for(adapter, common, modules) | {
        "target_parameters": _suffixes(adapter, parameters),
        **{key: adapter.config.get(key) if adapter.others else None for key in _OTHERS},
        "rank_pattern": {name: own.rank for name, own in exceptions.items()},
        "alpha_pattern": {name: own.alpha for name, own in exceptions.items()},
        "peft_version": WRITTEN_FOR,
    }
    return Plan({WEIGHTS: pieces}, config)


def plan_uniform(adapter: Adapter, program: str) -> Plan:
    """Plans stacked factors for a program that reads one rank and one alpha, and needs both parameters."""
    parts = [*adapter.weights.values(), *(part for *_, part in _stacked(adapter))]
    scale = Scale.of(parts)
    pieces = list(other_weights(adapter, scale, published=True))
    for module in adapter.experts:
        stacks = adapter.base.experts[module]
        both = projections(adapter, module, stacks.parameters, scale.rank)
        for key, part in zip((f"{module}.base_layer", module), both.values(), strict=True):
            pieces.append(_of_experts(key, part, stacks, scale))
    names = {name.rpartition(".")[2] for name in adapter.weights} | {"experts"}
    return Plan({WEIGHTS: pieces}, config_for(adapter, scale, names), left_out(adapter, program))


def _own(part: Factors) -> Scale:
    return Scale(part.rank, part.scaling)


def _stacked(adapter: Adapter) -> Iterator[tuple[str, str, str, Factors]]:
    """Yields (module, parameter, key, update) of adapted parameters; of two, the first is the inner one."""
    for module in adapter.experts:
        parameters = adapter.base.experts[module].parameters
        found = [adapter.projection(module, name) for name in parameters]
        for parameter, part in zip(parameters.values(), found, strict=True):
            if part is not None:
                is_inner = None not in found and parameter != "down_proj"
                yield module, parameter, f"{module}.base_layer" if is_inner else module, part


def _of_experts(key: str, part: Factors, stacks: Stacks, scale: Scale) -> Piece:
    assert part.num_experts is not None
    exchanged = stacks.transposed != stacks.declared
    columns = scale.rank * part.num_experts
    dtypes = part.scaled_dtypes(scale.scaling)
    dtypes = (dtypes[1], dtypes[1]) if exchanged else dtypes
    shapes = (columns, part.in_features), (part.out_features, columns)
    if exchanged:
        shapes = (columns, part.out_features), (part.in_features, columns)
    names = factor_names(key)
    kinds = dict(zip(names, zip(dtypes, shapes, strict=True), strict=True))
    interleaved = stacks.gating == INTERLEAVED and part.out_features == stacks.first_rows
    return Piece(kinds, partial(_make, names, part, scale, exchanged, interleaved))


def _make(names: tuple[str, ...], part: Factors, scale: Scale, exchanged: bool, interleaved: bool) -> Named:
    a, b = part.scaled(scale.rank, scale.scaling)
    if interleaved:
        b = torch.stack(b.chunk(2, dim=1), dim=2).flatten(1, 2)
    if exchanged:
        a, b = b.mT, a.to(b.dtype).mT
    yield names[0], a.flatten(0, 1)
    yield names[1], _flat_b(b)


def _flat_b(b: Tensor) -> Tensor:
    """Returns [out, r E], the expert innermost, of B [E, out, r]."""
    return b.permute(1, 2, 0).flatten(1, 2)


def _suffixes(adapter: Adapter, parameters: dict[str, Factors]) -> list[str]:
    """Returns target_parameters: names within a layer if they mean no more than the adapted parameters."""
    every = {f"{module}.weight" for module in adapter.base.weights} | {
        f"{module}.{parameter}"
        for module, stacks in adapter.base.experts.items()
        for parameter in stacks.parameters.values()
    }
    return list(_grouped(dict.fromkeys(parameters), every))


def _by_suffix(chosen: dict[str, Scale], every: dict[str, Factors]) -> dict[str, Scale]:
    """Returns regular expressions that match the chosen names only, each with its rank and scaling."""
    groups: dict[Scale, dict[str, None]] = defaultdict(dict)
    for name, own in chosen.items():
        groups[own][name] = None
    return {re.escape(name): own for own, names in groups.items() for name in _grouped(names, set(every))}


def _grouped(names: dict[str, None], every: set[str]) -> dict[str, None]:
    """Replaces names by what follows the layer number, where all names that end so are in the group."""
    found: dict[str, None] = {}
    for name in names:
        suffix = re.split(r"\.\d+\.", name)[-1]
        alike = {other for other in every if other == suffix or other.endswith(f".{suffix}")}
        found[suffix if alike <= names.keys() else name] = None
    return found
