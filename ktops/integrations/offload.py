"""offload_experts: moves a model to an accelerator, all but its routed experts."""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ktops._display import format_bytes
from ktops.devices.accelerator import find_accelerator, require_room
from ktops.integrations import peft
from ktops.integrations.gpu_experts import bytes_of_copies, choose, require_grouped_mm
from ktops.integrations.swap import experts_in_op
from ktops.integrations.transformers.architectures import operands
from ktops.integrations.transformers.outside import ForwardReplacement
from ktops.nn.device_experts import copy_to_device
from ktops.nn.host_memory import MOVES, ON_DEVICE, keep_in_host_memory


@dataclass(frozen=True)
class OffloadReport:
    """Where :func:`ktops.offload_experts` has placed a model.

    Attributes:
        device: where everything but the experts is.
        layers: the names of the experts modules in CPU memory, in order.
        bytes_on_device, bytes_on_cpu: sizes of the two parts, in bytes.
        copies: number of experts of which the device has copies.
        bytes_of_copies: their size on the device.
    """

    device: torch.device
    layers: tuple[str, ...]
    bytes_on_device: int
    bytes_on_cpu: int
    copies: int = 0
    bytes_of_copies: int = 0

    def __str__(self) -> str:
        text = (
            f"{format_bytes(self.bytes_on_device)} on {self.device}, and the experts of {len(self.layers)} "
            f"layers, {format_bytes(self.bytes_on_cpu)}, in CPU memory"
        )
        if not self.copies:
            return text
        return f"{text}, with copies of {self.copies}, {format_bytes(self.bytes_of_copies)}, on {self.device}"


def offload_experts(
    model: nn.Module,
    device: torch.device | str | int = "cuda",
    num_gpu_experts: int = 0,
    *,
    gpu_experts_mask: Tensor | Sequence[Tensor] | None = None,
) -> OffloadReport:
    """Moves a model to an accelerator, all but its routed experts, which stay in CPU memory.

    Routers, shared experts, attention, embeddings and buffers move, tensor by tensor. Experts and the
    adapters on them are neither moved nor copied. Their operators take hidden states on the device, and
    return them there; see ``docs/devices.md``.

    From then on, the experts also stay if the model is moved with ``.to(device)``, as trainers do; changes
    of dtype reach them. Adapters may be added before or after, and a second call moves what has been added
    since.

    Args:
        model: a model whose experts run through ktops: of transformers with
            ``experts_implementation="ktops"``, or after ``ktops.swap_experts``, ``quantize_experts`` or
            ``load_experts``; in CPU memory, with or without adapters. Experts that ktops does not run move
            too, with a warning.
        device: an accelerator of this machine.
        num_gpu_experts: how many experts of each layer, the first ones, the device computes. It gets dense
            copies of their weights; the CPU computes the other experts of the same tokens. Adapters on them
            work, but the weights themselves must be frozen. A second call replaces the copies.
        gpu_experts_mask: bool [L, E], or one [E] per layer: these instead of the first ones.
            :func:`ktops.count_routes` and ``ktops.compat.generate_gpu_experts_masks`` find the most used.

    Returns:
        An :class:`OffloadReport`. Its str() is a summary.

    Raises:
        ValueError: no such device, the model has no experts that ktops runs, or it is not loaded or already
            dispatched by accelerate; num_gpu_experts is out of range, the mask has a wrong shape, or ktops
            cannot split these experts. The model is unchanged.
        torch.OutOfMemoryError: the device has no room for what would move; the message says how much there
            would have to be. The model is unchanged.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="ktops")
        >>> print(ktops.offload_experts(model, "cuda"))
        2.9 GiB on cuda:0, and the experts of 48 layers, 54.0 GiB, in CPU memory
    """
    device = find_accelerator(device, "offload_experts")
    _require_placeable(model)
    names, outside = experts_in_op(model, "offload_experts")
    staying = {id(tensor) for name in names for tensor in _tensors_of_experts(model, name)}
    moving = [tensor for tensor in _tensors(model) if id(tensor) not in staying]
    chosen = choose(model, names, num_gpu_experts, gpu_experts_mask)
    copied = sum(bytes_of_copies(model.get_submodule(name), mask) for name, mask in chosen.items())
    number = sum(int(mask.sum()) for mask in chosen.values())
    if number:
        require_grouped_mm(device)
    require_room(
        device,
        sum(tensor.nbytes for tensor in moving if tensor.device != device) + copied,
        f"offload_experts: {type(model).__name__} without its experts"
        + (f", with copies of {number} of them," if number else ""),
    )
    if outside:
        warnings.warn(
            f"ktops.offload_experts moves the experts of {len(outside)} layers to {device}, because ktops "
            f"does not run them: {'; '.join(sorted(set(outside.values())))}",
            stacklevel=2,
        )
    peft.enable_if_installed()
    for name in names:
        for part in _parts(model.get_submodule(name)):
            keep_in_host_memory(part)
    model.to(device)
    moved, total = (sum(tensor.nbytes for tensor in tensors) for tensors in (moving, _tensors(model)))
    for name, mask in chosen.items():
        experts = model.get_submodule(name)
        copy_to_device(experts, mask, operands(experts)[0], device)
    return OffloadReport(device, tuple(names), moved, total - moved, number, copied)


def _require_placeable(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"offload_experts: model must be loaded, but {name} is on meta")
    for module in model.modules():
        device_map = module.__dict__.get("hf_device_map")
        if device_map is not None:
            devices = ", ".join(sorted({str(device) for device in device_map.values()}))
            raise ValueError(
                f"offload_experts: model must be in CPU memory, but accelerate has put it on {devices} "
                "(hf_device_map). Load it without device_map"
            )


def _parts(experts: nn.Module) -> list[nn.Module]:
    """Returns the modules that hold the tensors of experts; other modules in between may hold others."""
    if isinstance(experts, ForwardReplacement):
        return [experts.get_submodule(name) for name in experts.child_classes]
    return [experts]


def _tensors_of_experts(model: nn.Module, name: str) -> Iterator[Tensor]:
    """Yields the tensors of experts that stay in CPU memory, and those of adapters on them."""
    experts = model.get_submodule(name)
    wrapped = model.get_submodule(re.sub(r"(\.base_layer)+$", "", name))
    children = (experts._modules.get(child) for child in MOVES)
    moving = {id(tensor) for child in children if child is not None for tensor in _tensors(child)}
    for part in [wrapped] if wrapped is not experts else _parts(experts):
        yield from (tensor for tensor in _tensors(part) if id(tensor) not in moving)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yields every Parameter and buffer once, without copies of experts."""
    yield from module.parameters()
    yield from (buffer for name, buffer in module.named_buffers() if ON_DEVICE not in name.split("."))
