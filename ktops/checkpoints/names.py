"""Parses the names of experts' tensors without using a model (:mod:`.model_names` uses one).

Per expert   {base}.layers.{L}.mlp.experts.{e}.{gate_proj, up_proj, down_proj}.{tensor}; mlp may have other
             names, and the projections may be w1, w3, w2
fused        {base}.layers.{L}.mlp.experts.{gate_up_proj, down_proj}, followed by nothing, _{tensor} or
             .{tensor}
GGUF         blk.{L}.ffn_{gate, up, down, gate_up}_exps.{tensor}
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
EXPERTS = re.compile(r"((?:.+\.)?(?:layers|blocks|h)\.(\d{1,9})\.(?:.+\.)?experts)\.(.+)")
ONE_EXPERT = re.compile(r"(\d{1,9})\.(gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3)\.(\w+)")
FUSED = re.compile(r"(gate_up_proj|gate_proj|up_proj|down_proj)(?:[._](\w+))?")
GGUF = re.compile(r"(blk\.(\d{1,9}))\.ffn_(gate_up|gate|up|down)_exps\.(\w+)")

PROJECTIONS = {
    "w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "gate_up_proj": "gate_up", "gate": "gate", "up": "up", "down": "down", "gate_up": "gate_up",
}  # fmt: skip

EVERY_EXPERT = -1

_LISTED = 12


class Key(NamedTuple):
    """The parts of a tensor's name.

    Attributes:
        experts: the name of the experts in the checkpoint, "model.layers.3.mlp.experts".
        layer: the layer's number.
        expert: the expert's index; EVERY_EXPERT if the tensor holds all.
        projection: "gate", "up", "down" or "gate_up".
        tensor: "weight", "bias", "weight_scale", ...
        module: the experts module of the model that transformers loads it into; None if there is none.
        gating: how the model holds gate and up, as in :func:`ktops.moe_sft`; None without a model.
        layout: how the file does, or None if only the tensors can tell; otherwise the name of a transformers
            operation that ktops does not support.
    """

    experts: str
    layer: int
    expert: int
    projection: str
    tensor: str
    module: str | None = None
    gating: str | None = None
    layout: str | None = None


def parse(name: str) -> Key | None:
    """Parses the name of an expert's tensor; None for any other tensor.

    Example:
        >>> parse("model.layers.3.mlp.experts.7.up_proj.weight")[:5]
        ('model.layers.3.mlp.experts', 3, 7, 'up', 'weight')
    """
    match = GGUF.fullmatch(name)
    if match:
        experts, layer, projection, tensor = match.groups()
        return Key(experts, int(layer), EVERY_EXPERT, PROJECTIONS[projection], tensor)
    match = EXPERTS.fullmatch(name)
    if not match:
        return None
    experts, layer, rest = match.groups()
    found = parse_tensor(rest)
    return None if found is None else Key(experts, int(layer), *found)


def parse_tensor(rest: str) -> tuple[int, str, str] | None:
    """Parses expert, projection and tensor from a name without the experts' name; None for other tensors.

    Example:
        >>> parse_tensor("7.up_proj.weight")
        (7, 'up', 'weight')
    """
    one = ONE_EXPERT.fullmatch(rest)
    if one:
        expert, projection, tensor = one.groups()
        return int(expert), PROJECTIONS[projection], tensor
    fused = FUSED.fullmatch(rest)
    if fused:
        projection, tensor = fused.groups()
        return EVERY_EXPERT, PROJECTIONS[projection], tensor or "weight"
    return None


def layer_number(name: str) -> int | None:
    """Returns the number of the layer that contains a module; None if its name has no number.

    Example:
        >>> layer_number("thinker.model.layers.3.mlp.experts")
        3
    """
    numbers = NUMBER.findall(name)
    return int(numbers[-1]) if numbers else None


def family(name: str) -> str:
    """Returns the part of the name before the layer number, which all layers of a part of a model share.

    Example:
        >>> family("thinker.model.layers.3.mlp.experts")
        'thinker.model.layers.'
    """
    numbers = list(NUMBER.finditer(name))
    return name[: numbers[-1].start()] if numbers else name


def summary(names: Iterable[str]) -> str:
    """Summarizes names for messages, with ``*`` for numbers and names that may be experts' first.

    Example:
        >>> summary(f"model.layers.{layer}.moe.w1" for layer in range(48))
        'model.layers.*.moe.w1'
    """
    kinds = dict.fromkeys(NUMBER.sub("*", name) for name in names)
    ordered = sorted(kinds, key=lambda kind: not re.search("expert|moe|exps|mlp|ffn|feed_forward", kind))
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return (", ".join(ordered[:_LISTED]) or "none") + more
