"""Copies of consecutive experts to an accelerator, portion by portion.

Memory on the device is that of two portions. Where copies can overlap with other work, a portion is copied
in a stream of its own while the previous one is in use.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType

import torch
from torch import Tensor

from ktops.devices.staging import Block
from ktops.devices.transfer import PINNED, recorded, staging


@dataclass
class Buffer:
    """Memory for a portion.

    Attributes:
        tensors: on the device, by name, with the size of the largest portion.
        blocks: pinned memory for the same, where the device needs it.
        free_after: the event after which the device no longer reads ``tensors``.
    """

    tensors: dict[str, Tensor]
    blocks: dict[str, Block] = field(default_factory=dict)
    free_after: torch.Event | None = None


class Portions:
    """A context that copies experts to the device.

    Args:
        weights: tensors [E, ...] in CPU memory by name.
        capacity: the most experts in a portion.
        device: an accelerator.

    Example:
        >>> with Portions({"down_proj": down_proj}, 2, device) as portions:
        ...     with portions.on_device([4, 5]) as portion:
        ...         portion["down_proj"].shape
        torch.Size([2, 64, 32])
    """

    def __init__(self, weights: Mapping[str, Tensor], capacity: int, device: torch.device) -> None:
        self.weights = weights
        self.device = device
        self.overlaps = device.type in PINNED
        self._stack = ExitStack()
        self._buffers = [self._buffer(capacity) for _ in range(2)]

    def _buffer(self, capacity: int) -> Buffer:
        return Buffer(
            {
                name: torch.empty(capacity, *weight.shape[1:], dtype=weight.dtype, device=self.device)
                for name, weight in self.weights.items()
            }
        )

    def __enter__(self) -> "Portions":
        if self.overlaps:
            self._copies = torch.Stream(self.device)
            for buffer in self._buffers:
                buffer.free_after = recorded(self.device)  # memory that earlier work may still use
                for name, tensor in buffer.tensors.items():
                    buffer.blocks[name] = self._stack.enter_context(staging.block(tensor.nbytes))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.overlaps and kind is not None:
            self._copies.synchronize()  # nothing may wait for its last copies yet
        self._stack.close()

    @contextmanager
    def on_device(self, experts: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """Lends the tensors of these experts [G, ...]; what uses them is enqueued inside the context."""
        buffer = self._buffers.pop(0)
        self._buffers.append(buffer)
        portion = {name: tensor[: len(experts)] for name, tensor in buffer.tensors.items()}
        if self.overlaps:
            self._copy_in_stream(buffer, portion, experts)
        else:
            for name, target in portion.items():
                copy_experts(self.weights[name], experts, target)
        yield portion
        if self.overlaps:
            buffer.free_after = recorded(self.device)

    def _copy_in_stream(self, buffer: Buffer, portion: dict[str, Tensor], experts: Sequence[int]) -> None:
        for block in buffer.blocks.values():
            if block.free_after is not None:
                block.free_after.synchronize()
        staged = {name: buffer.blocks[name].view(target) for name, target in portion.items()}
        for name, target in staged.items():
            copy_experts(self.weights[name], experts, target)
        assert buffer.free_after is not None
        self._copies.wait_event(buffer.free_after)
        with self._copies:
            for name, target in portion.items():
                target.copy_(staged[name], non_blocking=True)
            copied = recorded(self.device)
        for block in buffer.blocks.values():
            block.free_after = copied
        torch.accelerator.current_stream(self.device).wait_event(copied)


def copy_experts(weight: Tensor, experts: Sequence[int], target: Tensor) -> None:
    """Copies these experts, ascending, of a weight [E, ...] to a target [G, ...], run by run."""
    breaks = [slot for slot in range(1, len(experts)) if experts[slot] != experts[slot - 1] + 1]
    for begin, end in pairwise([0, *breaks, len(experts)]):
        target[begin:end].copy_(weight[experts[begin] : experts[begin] + end - begin])
