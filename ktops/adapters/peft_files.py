"""Reads the keys of PEFT: linear modules, stacked parameters of experts, and modules of single experts."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

from ktops.adapters.base import BaseModel, Stacks
from ktops.adapters.config import LoraSettings
from ktops.adapters.errors import AdapterError
from ktops.adapters.factors import Factors
from ktops.adapters.tensors import common_dtype, expect, read_pair, sizes, stacked_factors
from ktops.checkpoints.names import EVERY_EXPERT, parse_tensor
from ktops.checkpoints.view import View
from ktops.nn.find import without_base_layer
from ktops.ops.activation import INTERLEAVED

PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.lora_(?:(embedding)_)?([AB])(?:\.weight)?")
BASE_WEIGHT = ".base_layer.weight"
"""The end of a key under which PEFT saves the unchanged weight of an adapted head or embedding."""

TOKENS = ".token_adapter.trainable_tokens_delta"
"""The end of the key of rows of an embedding or head that PEFT trains instead of all."""

NOT_PLAIN = re.compile(r"\.lora_(magnitude_vector|B\.bias)")
FLOATS = {torch.float32, torch.bfloat16, torch.float16, torch.float64}

READS_DECLARATION = Version("0.19")
"""The first version of PEFT for which it matters whether an experts module says that it is transposed."""

READS_IT_RIGHT = Version("0.19.1")
"""The first version that does not take it for the opposite."""


@dataclass
class Contents:
    """What a file holds.

    Attributes:
        weights: the updates of weights other than the experts, by module.
        experts: the updates of experts, by module, then by projection: "gate", "up", "down" or "gate_up",
            whose rows are those of gate, then those of up.
        others: the other tensors, such as those of modules_to_save, by key.
    """

    weights: dict[str, Factors] = field(default_factory=dict)
    experts: dict[str, dict[str, Factors]] = field(default_factory=lambda: defaultdict(dict))
    others: dict[str, View] = field(default_factory=dict)


Pair = dict[str, View]
"""The two factors, "A" and "B"."""


def read(views: Mapping[str, View], settings: LoraSettings, base: BaseModel, version: str | None) -> Contents:
    """Returns the contents of an adapter_model.safetensors.

    Args:
        views: its tensors.
        settings: of its adapter_config.json.
        version: the version of PEFT that wrote it, or None.

    Raises:
        AdapterError: a tensor does not fit the model or the config; the message names it and the file.
    """
    contents, of_experts = Contents(), defaultdict[str, dict[str, dict[int, Pair]]](lambda: defaultdict(dict))
    pairs = _pairs(views, contents)
    for name, pair in pairs.items():
        module = without_base_layer(name)
        key = base.names.key(f"{module}.weight")
        if module in base.experts:
            projection, factors = _read_stacked(name, pairs, settings, base, version)
            contents.experts[module][projection] = factors
        elif key is not None and key.module in base.experts and key.expert != EVERY_EXPERT:
            of_experts[key.module][key.projection][key.expert] = pair
        elif (half := _stack_of_projection(module, pair, base)) is not None:
            experts = module.rpartition(".")[0]
            contents.experts[experts][half] = stacked_factors(
                pair["A"], pair["B"], module, half, settings, base.experts[experts]
            )
        elif (weight := base.weight_named(module)) is not None:
            contents.weights[weight] = _read_weight(weight, pair, settings, base)
        else:
            raise AdapterError(
                f"{pair['A']}: the base model of {base.where} has no module {module}. Is the adapter for "
                "another model?"
            )
    for experts, projections in of_experts.items():
        for projection, of_each in projections.items():
            contents.experts[experts][projection] = _read_single(experts, projection, of_each, settings, base)
    _require_one_form(contents)
    return contents


def _pairs(views: Mapping[str, View], contents: Contents) -> dict[str, Pair]:
    """Groups the factors by module, and puts other tensors into the contents."""
    pairs: dict[str, Pair] = defaultdict(dict)
    for name, view in views.items():
        if NOT_PLAIN.search(name):
            raise AdapterError(f"{view}: DoRA and biases are not supported, only plain LoRA is")
        match = FACTOR.fullmatch(name)
        if match is None:
            if not name.endswith(BASE_WEIGHT):
                contents.others[name] = view
            continue
        if view.dtype not in FLOATS or view.dim not in (2, 3):
            raise AdapterError(
                f"{view}: expected a float matrix, got {view.dtype} of shape {list(view.shape)}"
            )
        pairs[match[1].removeprefix(PREFIX)][match[3]] = view
    for name, pair in pairs.items():
        if len(pair) < 2:
            (view,) = pair.values()
            raise AdapterError(f"{view}: the other factor of {name} is missing")
    return pairs


def _read_weight(name: str, pair: Pair, settings: LoraSettings, base: BaseModel) -> Factors:
    a, b = pair["A"], pair["B"]
    out_features, in_features = base.weights[name]
    if name in base.embeddings:
        out_features, in_features = in_features, out_features
    rank = a.shape[0]
    expect(a, (rank, in_features), name)
    expect(b, (out_features, rank), name)
    scaling = settings.scaling(name, rank, str(a))
    return Factors(rank, out_features, in_features, scaling, common_dtype(a, b), partial(read_pair, a, b))


def _read_stacked(
    name: str, pairs: Mapping[str, Pair], settings: LoraSettings, base: BaseModel, version: str | None
) -> tuple[str, Factors]:
    """Reads the factors A [r E, in] and B [out, r E] of a stacked parameter, or the same with roles swapped.

    Of two adapted parameters, the inner one, with base_layer in its name, is the first. A single one is
    recognized by its sizes. So are the roles, unless in = out; then the version of PEFT decides.

    Returns:
        The projection and its update.
    """
    module = without_base_layer(name)
    stacks, a, b = base.experts[module], pairs[name]["A"], pairs[name]["B"]
    parameters = stacks.parameters
    given, size_of = (a.shape[1], b.shape[0]), {each: sizes(stacks, each)[::-1] for each in parameters}
    possible = [each for each in parameters if given in (size_of[each], size_of[each][::-1])]
    if module != name:
        possible = [each for each in possible if each != "down"]
    elif f"{name}.base_layer" in pairs:
        possible = [each for each in possible if each == "down"]
    elif len(possible) > 1:
        possible = [each for each in possible if settings.targets(parameters[each])]
    if (
        not possible
        or a.dim != 2
        or b.dim != 2
        or a.shape[0] != b.shape[1]
        or a.shape[0] % stacks.num_experts
    ):
        raise AdapterError(
            f"{a}: factors of shapes {list(a.shape)} and {list(b.shape)} do not fit {module} of "
            f"{base.where}, which has {stacks.num_experts} experts with sizes {stacks.hidden_size} and "
            f"{stacks.intermediate_size}. Is the adapter for another model?"
        )
    projection, rank = possible[0], a.shape[0] // stacks.num_experts
    in_features, out_features = size_of[projection]
    swapped = given[0] != in_features
    if in_features == out_features:
        swapped = _swapped_by_version(stacks, version)
    weight, is_gate_up = f"{module}.{parameters[projection]}", projection == "gate_up"
    scaling = settings.scaling(weight, rank, str(a), is_gate_up=is_gate_up)
    interleaved = is_gate_up and stacks.gating == INTERLEAVED
    load = partial(_load_stacked, a, b, stacks.num_experts, swapped, interleaved)
    dtype = common_dtype(a, b)
    return projection, Factors(rank, out_features, in_features, scaling, dtype, load, stacks.num_experts)


def _swapped_by_version(stacks: Stacks, version: str | None) -> bool:
    """True if PEFT takes A for the factor of the output.

    It takes weights for [E, in, out] if their module says so; 0.19.0 if it does not, and 0.18 always.
    """
    try:
        release = Version(version or "0.18").release
    except InvalidVersion:
        release = READS_IT_RIGHT.release
    if release >= READS_IT_RIGHT.release:
        taken_for_transposed = stacks.declared
    else:
        taken_for_transposed = not stacks.declared or release < READS_DECLARATION.release
    return taken_for_transposed != stacks.transposed


def _load_stacked(
    a: View, b: View, num_experts: int, swapped: bool, interleaved: bool
) -> tuple[Tensor, Tensor]:
    first, second = read_pair(a, b)
    first = first.view(num_experts, -1, first.shape[1])
    second = second.view(second.shape[0], -1, num_experts).permute(2, 0, 1)
    if swapped:
        first, second = second.mT, first.mT
    if interleaved:
        second = torch.cat([second[:, 0::2], second[:, 1::2]], dim=1)
    return first, second


def _read_single(
    experts: str, projection: str, pairs: dict[int, Pair], settings: LoraSettings, base: BaseModel
) -> Factors:
    """Reads the factors of every expert; experts without any get zeros."""
    stacks = base.experts[experts]
    out_features, in_features = sizes(stacks, projection)
    count, ranks, scalings, dtypes = stacks.num_experts, set(), set(), set()
    for expert, pair in pairs.items():
        a, b = pair["A"], pair["B"]
        name = f"{experts}.{expert}.{projection}_proj"
        if expert >= count:
            raise AdapterError(f"{a}: the base model of {base.where} has {count} experts")
        expect(a, (a.shape[0], in_features), name)
        expect(b, (out_features, a.shape[0]), name)
        ranks.add(a.shape[0])
        scalings.add(settings.scaling(name, a.shape[0], str(a)))
        dtypes.add(common_dtype(a, b))
    if len(scalings) > 1 or len(ranks) > 1 or len(dtypes) > 1:
        raise AdapterError(f"{experts}: the experts' adapters of {projection} differ in rank, alpha or dtype")
    (rank,), (scaling,), (dtype,) = ranks, scalings, dtypes

    def load() -> tuple[Tensor, Tensor]:
        a = torch.zeros(count, rank, in_features, dtype=dtype)
        b = torch.zeros(count, out_features, rank, dtype=dtype)
        for expert, pair in pairs.items():
            a[expert], b[expert] = read_pair(pair["A"], pair["B"])
        return a, b

    return Factors(rank, out_features, in_features, scaling, dtype, load, count)


def _stack_of_projection(module: str, pair: Pair, base: BaseModel) -> str | None:
    """Returns the projection whose factors of all experts these are, [E, r, in] and [E, out, r]."""
    experts, _, name = module.rpartition(".")
    parsed = parse_tensor(f"0.{name}.weight")
    is_stack = experts in base.experts and pair["A"].dim == pair["B"].dim == 3
    return parsed[1] if is_stack and parsed is not None else None


def _require_one_form(contents: Contents) -> None:
    for module, projections in contents.experts.items():
        if "gate_up" in projections and not {"gate", "up"}.isdisjoint(projections):
            raise AdapterError(f"{module}: has adapters on gate_up_proj and on its halves too")
