"""What checkpoints call the tensors of experts.

Per expert   {base}.layers.{L}.mlp.experts.{e}.{gate_proj, up_proj, down_proj}.{tensor}, with other names for
             mlp, and w1, w3, w2 for the projections
fused        {base}.layers.{L}.mlp.experts.{gate_up_proj, down_proj}, followed by nothing, _{tensor} or
             .{tensor}
GGUF         blk.{L}.ffn_{gate, up, down, gate_up}_exps.{tensor}
"""

import re
from typing import NamedTuple

EXPERTS = re.compile(r"((?:.+\.)?(?:layers|blocks|h)\.(\d{1,9})\.(?:.+\.)?experts)\.(.+)")
ONE_EXPERT = re.compile(r"(\d{1,9})\.(gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3)\.(\w+)")
FUSED = re.compile(r"(gate_up_proj|gate_proj|up_proj|down_proj)(?:[._](\w+))?")
GGUF = re.compile(r"(blk\.(\d{1,9}))\.ffn_(gate_up|gate|up|down)_exps\.(\w+)")

PROJECTIONS = {
    "w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "gate_up_proj": "gate_up", "gate": "gate", "up": "up", "down": "down", "gate_up": "gate_up",
}  # fmt: skip

EVERY_EXPERT = -1


class Key(NamedTuple):
    """What a tensor's name says.

    Attributes:
        experts: the name of the experts module in the checkpoint, "model.layers.3.mlp.experts".
        layer: its number.
        expert: which one; EVERY_EXPERT if the tensor holds all.
        projection: "gate", "up", "down" or "gate_up".
        tensor: "weight", "bias", "weight_scale", ...
    """

    experts: str
    layer: int
    expert: int
    projection: str
    tensor: str


def parse(name: str) -> Key | None:
    """The parts of the name of an expert's tensor; None for any other tensor.

    Example:
        >>> parse("model.layers.3.mlp.experts.7.up_proj.weight")
        Key(experts='model.layers.3.mlp.experts', layer=3, expert=7, projection='up', tensor='weight')
    """
    match = GGUF.fullmatch(name)
    if match:
        experts, layer, projection, tensor = match.groups()
        return Key(experts, int(layer), EVERY_EXPERT, PROJECTIONS[projection], tensor)
    match = EXPERTS.fullmatch(name)
    if not match:
        return None
    experts, layer, rest = match.groups()
    one = ONE_EXPERT.fullmatch(rest)
    if one:
        expert, projection, tensor = one.groups()
        return Key(experts, int(layer), int(expert), PROJECTIONS[projection], tensor)
    fused = FUSED.fullmatch(rest)
    if fused:
        projection, tensor = fused.groups()
        return Key(experts, int(layer), EVERY_EXPERT, PROJECTIONS[projection], tensor or "weight")
    return None
