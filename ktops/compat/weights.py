"""Loads the experts of a layer in the order of their physical ids, from tensors or a checkpoint."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from ktops._warn import warn_once
from ktops.checkpoints import Checkpoint, CheckpointError, Layer, open_checkpoint
from ktops.checkpoints.experts import Experts, Requantized
from ktops.checkpoints.match import numbered_layer
from ktops.compat.methods import Method
from ktops.formats import Codes, ExpertWeight
from ktops.formats.plain import PLAIN

Weights = tuple[Tensor | ExpertWeight, Tensor | ExpertWeight]
"""gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""


def expert_order(physical_to_logical_map: Tensor | None, num_experts: int) -> list[int]:
    """Returns the logical expert of every physical id.

    Raises:
        ValueError: the map does not have num_experts entries, or an entry is not an expert.
        TypeError: the map does not hold integers.
    """
    if physical_to_logical_map is None:
        return list(range(num_experts))
    given = torch.as_tensor(physical_to_logical_map, device="cpu")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"KTMoEWrapper: physical_to_logical_map must hold integers, got {given.dtype}")
    if list(given.shape) != [num_experts]:
        raise ValueError(
            f"KTMoEWrapper: physical_to_logical_map must have shape [{num_experts}], got {list(given.shape)}"
        )
    order = given.tolist()
    for slot, expert in enumerate(order):
        if not 0 <= expert < num_experts:
            raise ValueError(
                f"KTMoEWrapper: physical_to_logical_map must hold experts 0 to {num_experts - 1}, "
                f"got {expert} at {slot}"
            )
    return order


class Given(Experts):
    """Tensors [E, N, K] of one dtype, concatenated along N."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = [tensor.detach().cpu() for tensor in tensors]
        self.format, self.group_size = PLAIN[tensors[0].dtype], 0
        num_experts, _, columns = tensors[0].shape
        self.shape = num_experts, sum(tensor.shape[1] for tensor in tensors), columns

    def expert(self, index: int) -> Codes:
        return Codes(torch.cat([tensor[index] for tensor in self.tensors]))


class Ordered(Experts):
    """Experts in another order."""

    def __init__(self, source: Experts, order: list[int]) -> None:
        self.source, self.order = source, order
        self.format, self.group_size, self.shape = source.format, source.group_size, source.shape

    def expert(self, index: int) -> Codes:
        return self.source.expert(self.order[index])


def _read(experts: Experts, order: list[int]) -> Tensor | ExpertWeight:
    """Reads the experts into memory, or maps them if in file order; returns a plain tensor for bfloat16."""
    weight = (experts if order == list(range(len(experts))) else Ordered(experts, order)).read()
    return weight.weight if weight.format == "bf16" else weight


def from_tensors(
    gate: Tensor, up: Tensor, down: Tensor, order: list[int], format: str, group_size: int
) -> Weights:
    """Quantizes tensors expert by expert.

    Raises:
        TypeError: a dtype is not bfloat16, float16 or float32, or gate and up differ in dtype.
        ValueError: the format cannot hold these weights.
    """
    for name, tensor in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        if tensor.dtype not in PLAIN:
            raise TypeError(f"KTMoEWrapper: {name} must be bfloat16, float16 or float32, got {tensor.dtype}")
    if up.dtype != gate.dtype:
        raise TypeError(
            f"KTMoEWrapper: up_proj must have the dtype of gate_proj={gate.dtype}, got {up.dtype}"
        )
    both = Given(gate, up), Given(down)
    gate_up_proj, down_proj = (
        _read(given if given.format == format else Requantized(given, format, group_size), order)
        for given in both
    )
    return gate_up_proj, down_proj


def from_checkpoint(
    path: Path,
    layer_idx: int,
    prefix: str | None,
    sizes: dict[str, int],
    order: list[int],
    method: Method,
    group_size: int,
) -> Weights:
    """Loads the experts of a layer in the format of a method.

    Args:
        prefix: prefix of the name of the layer's experts, if several layers have the number.
        sizes: num_experts, hidden_size and moe_intermediate_size that the layer must have.
        group_size: the group size for quantizing.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ValueError: it has no such layer, several, or one with other sizes; or the format cannot hold the
            layer's weights.
    """
    layer = _layer(path, layer_idx, prefix).ordered("concatenated")
    layer.check()
    found = layer.num_experts, layer.hidden_size, layer.intermediate_size
    for (name, size), actual in zip(sizes.items(), found, strict=True):
        if size != actual:
            raise ValueError(f"KTMoEWrapper: {name} must be {actual} for {layer.name} in {path}, got {size}")
    if any(layer.bias(name, torch.bfloat16) is not None for name in ("gate_up_proj", "down_proj")):
        raise ValueError(
            f"KTMoEWrapper: {layer.name} in {path} has biases, which KTMoEWrapper does not support: use "
            "ktops.load_experts"
        )
    if not method.format or layer.scheme.startswith(method.schemes):
        both = layer.experts()
    else:
        both = layer.experts(method.format, group_size=group_size)
        again = [name for name in layer.formats if name not in PLAIN.values()]
        if again and any(isinstance(experts, Requantized) for experts in both):
            warn_once(
                f"KTMoEWrapper: {layer.name} in {path} is {layer.scheme}: quantized again, to {method.format}"
            )
    gate_up_proj, down_proj = (_read(experts, order) for experts in both)
    return gate_up_proj, down_proj


def _layer(path: Path, layer_idx: int, prefix: str | None) -> Layer:
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    stats = ((file.name, file.stat()) for file in files)
    checkpoint = _opened(path, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
    try:
        return numbered_layer(checkpoint, layer_idx, prefix)
    except CheckpointError as error:
        raise ValueError(
            f"KTMoEWrapper: layer_idx must be one layer with experts, got {layer_idx}: {error}"
        ) from None


@functools.lru_cache(maxsize=2)
def _opened(path: Path, files: tuple) -> Checkpoint:
    """Opens a checkpoint, cached for the other layers while the files stay the same."""
    return open_checkpoint(path)
