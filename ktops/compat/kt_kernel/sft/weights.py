"""The names of KTransformers' module ``kt_kernel.sft.weights``: the experts of a layer as three tensors."""

from pathlib import Path

from torch import Tensor, nn

from ktops._huge_pages import stack_in_huge_pages
from ktops.checkpoints import open_checkpoint
from ktops.checkpoints.match import numbered_layer
from ktops.compat.kt_kernel.sft.arch import MOEArchConfig
from ktops.compat.kt_kernel.sft.unsupported import (
    BlockFP8ExpertWeights,
    INT8ExpertWeights,
    RAWINT4ExpertWeights,
    load_block_fp8_experts_from_checkpoint_files,
    load_experts_from_kt_weight_path,
    load_rawint4_experts_from_checkpoint_files,
)

__all__ = [
    "BlockFP8ExpertWeights",
    "INT8ExpertWeights",
    "RAWINT4ExpertWeights",
    "extract_moe_weights",
    "get_kt_expert_placeholders",
    "load_block_fp8_experts_from_checkpoint_files",
    "load_experts_from_checkpoint_files",
    "load_experts_from_kt_weight_path",
    "load_rawint4_experts_from_checkpoint_files",
]

Three = tuple[Tensor, Tensor, Tensor]
"""gate [E, I, H], up [E, I, H] and down [E, H, I]."""


def extract_moe_weights(moe_module: nn.Module, moe_config: MOEArchConfig) -> Three:
    """Returns the weights of a MoE block's experts: views of stacked ones, copies of a list's.

    Raises:
        TypeError: the experts are in a weight format.
    """
    experts = getattr(moe_module, moe_config.experts_attr)
    if isinstance(experts, nn.ModuleList):
        gate, up, down = (
            stack_in_huge_pages([[getattr(expert, name).weight.detach()] for expert in experts])
            for name in moe_config.weight_names
        )
        return gate, up, down
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        raise TypeError("extract_moe_weights: the experts are in a format; see ktops.ExpertWeight.dequantize")
    gate, up = gate_up.detach().chunk(2, dim=1)
    return gate, up, down.detach()


def load_experts_from_checkpoint_files(
    checkpoint_files: list[str],
    sharded_metadata: dict | None,
    layers_prefix: str,
    moe_config: MOEArchConfig,
    layer_idx: int,
    block_size: tuple[int, int] | None = None,
) -> Three:
    """Reads the experts of a layer in bfloat16, from a checkpoint in any format that ktops reads.

    Args:
        checkpoint_files: files of the checkpoint, all in one directory.
        sharded_metadata, moe_config, block_size: unused; the files say it.
        layers_prefix: how the names of the layers begin, such as "model.layers".
        layer_idx: the number of the layer.

    Raises:
        ktops.checkpoints.CheckpointError: the checkpoint cannot be read, or has no such layer.
    """
    checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent)
    layer = numbered_layer(checkpoint, layer_idx, f"{layers_prefix}.").ordered("concatenated")
    gate_up, down = (experts.read().dequantize() for experts in layer.experts("bf16"))
    gate, up = gate_up.chunk(2, dim=1)
    return gate, up, down


def get_kt_expert_placeholders(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that stand for weights held elsewhere: none, as experts keep theirs."""
    return {}
