"""ktops.moe_sft with the kernels that KTOPS_ISA selects."""

from torch import Tensor

from bench import moe_fwd, moe_sft
from bench.layer import Inputs, Layer, Variant


class Contestant:
    """Provides forward without LoRA and training with LoRA of the rank."""

    def __init__(self, layer: Layer, rank: int) -> None:
        self.layer, self.rank = layer, rank

    def forward(self, inputs: Inputs) -> Tensor:
        return moe_fwd.call(self.layer, Variant(), inputs)

    def training(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        return moe_sft.call(self.layer, Variant(self.rank), inputs)
