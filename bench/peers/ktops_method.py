"""ktops.moe_sft on codes from a file, with the kernels that KTOPS_ISA selects."""

import torch
from torch import Tensor

from bench import moe_fwd, moe_sft
from bench.layer import Inputs, Layer, Variant
from ktops import ExpertWeight
from ktops.formats import Codes


def expert_weight(stored: dict) -> ExpertWeight:
    """Returns the weight made of {"format", "shape", "group_size", "weight", "scale", "zero"}."""
    codes = Codes(*(stored[name] for name in Codes._fields)).map(Tensor.clone)
    return ExpertWeight(stored["format"], stored["shape"], *codes, group_size=stored["group_size"])


class Contestant:
    """Provides forward without LoRA and training with LoRA of the rank; releases the layer's own weights.

    Args:
        method: the name of the kt-kernel method, for the log.
        file: {"gate_up": {...}, "down": {...}} as :func:`expert_weight` reads them.
    """

    def __init__(self, layer: Layer, rank: int, method: str, file: str) -> None:
        self.layer, self.rank = layer, rank
        stored = torch.load(file, mmap=True, weights_only=True)
        for name in ("gate_up", "down"):  # where the layer has tensors: ktops.moe_sft takes either
            setattr(layer, f"{name}_proj", expert_weight(stored[name]))

    def forward(self, inputs: Inputs) -> Tensor:
        return moe_fwd.call(self.layer, Variant(), inputs)

    def training(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        return moe_sft.call(self.layer, Variant(self.rank), inputs)
