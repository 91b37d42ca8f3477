"""Stacks the matrices of gate and up as the rows of one projection, in the order that the model has."""

from collections import Counter
from functools import partial

import torch
from torch import Tensor

from ktops._warn import warn_once
from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.experts import FileExperts, Requantized, StoredExperts, float_rows
from ktops.checkpoints.matrix import Matrix
from ktops.formats import Codes
from ktops.ops.activation import INTERLEAVED


class Mixed(StoredExperts):
    """Experts that the files hold in several formats, decoded to float32 for quantizing to one format.

    Args:
        experts: for each expert, the matrices that are stacked by rows.
    """

    def __init__(self, experts: list[list[Matrix]]) -> None:
        self.parts = [[FileExperts([[part]]) for part in parts] for parts in experts]
        index, odd, common = _odd_one(experts)
        self.refusal = (
            f"{odd.name}: expert {index} differs from the others: expected {common}, got "
            f"{odd}. Pass weight_format to quantize them all to one format"
        )
        first = self.parts[0]
        if any(part.shape[-1] != first[0].shape[-1] for part in first):
            raise CheckpointError(f"{first[0].name(0)}: gate and up must have the same number of columns")
        self.shape = len(experts), sum(part.shape[1] for part in first), first[0].shape[-1]
        self.format, self.group_size = "fp32", 0
        self.scheme = "mixed " + " and ".join(
            dict.fromkeys(part.scheme for parts in experts for part in parts)
        )

    def expert(self, index: int) -> Codes:
        out, row = torch.empty(self.shape[1:]), 0
        for part in self.parts[index]:
            for floats in float_rows(part, 0):
                out[row : row + len(floats)] = floats
                row += len(floats)
        return Codes(out)

    def name(self, index: int) -> str:
        return f"expert {index} of {' and '.join(part.experts[0][0].name for part in self.parts[index])}"

    @property
    def stand_in(self) -> Codes:
        return Codes(torch.empty(self.shape[1:], device="meta"))


class Reordered(StoredExperts):
    """Experts whose gate and up rows are read in the other order.

    Args:
        source: the experts, whose scales have one entry per row.
        gating: the order to read, "concatenated" or "interleaved".
    """

    def __init__(self, source: StoredExperts, gating: str) -> None:
        self.source, self.gating, self._in_order = source, gating, partial(in_order, gating=gating)
        self.format, self.group_size, self.shape = source.format, source.group_size, source.shape
        self.scheme, self.refusal = source.scheme, source.refusal

    @property
    def stand_in(self) -> Codes:
        return self.source.stand_in

    def expert(self, index: int) -> Codes:
        return self.source.expert(index).map(self._in_order)

    def name(self, index: int) -> str:
        return self.source.name(index)


def in_order(rows: Tensor, gating: str) -> Tensor:
    """Reorders the rows of gate and up from one order, "concatenated" or "interleaved", to the other."""
    if gating == INTERLEAVED:
        return torch.stack(rows.chunk(2), dim=1).flatten(0, 1)
    return torch.cat([rows[0::2], rows[1::2]])


def _odd_one(experts: list[list[Matrix]]) -> tuple[int, Matrix, Matrix]:
    """Returns the first expert with a matrix of unusual layout, that matrix, and one of the usual layout."""
    for parts in zip(*experts, strict=True):
        (layout, _), *others = Counter(part.layout for part in parts).most_common()
        if others:
            index = next(index for index, part in enumerate(parts) if part.layout != layout)
            return index, parts[index], next(part for part in parts if part.layout == layout)
    raise AssertionError("all experts are alike")


def _are_mixed(experts: list[list[Matrix]]) -> bool:
    """True if the experts have one shape but different layouts."""
    return any(
        len({part.layout for part in parts}) > 1 and len({(part.rows, part.columns) for part in parts}) == 1
        for parts in zip(*experts, strict=True)
    )


def stack(experts: list[list[Matrix]]) -> StoredExperts:
    """Returns the experts of a projection.

    If gate and up differ in format, warns and decodes both to bf16. If experts differ, returns a Mixed.
    """
    first = experts[0]
    if _are_mixed(experts):
        return Mixed(experts)
    if all((part.format, part.group_size) == (first[0].format, first[0].group_size) for part in first):
        return FileExperts(experts)
    warn_once(
        f"ktops: {first[0].name} is {first[0].format} and {first[1].name} {first[1].format}. Both need one "
        "format, so they are decoded to bf16, 16 bits per weight. Pass weight_format to choose another."
    )
    halves = [FileExperts([[parts[half]] for parts in experts]) for half in range(2)]
    return Stacked(halves)


class Stacked(StoredExperts):
    """Gate and up stacked by rows in bf16, because the files hold them in two formats."""

    def __init__(self, halves: list[FileExperts]) -> None:
        self.parts = [Requantized(half, "bf16") for half in halves]
        first, second = self.parts
        if first.shape[::2] != second.shape[::2]:
            raise CheckpointError(f"gate of shape {first.shape} and up of shape {second.shape} do not match")
        self.format, self.group_size = first.format, first.group_size
        self.shape = first.shape[0], first.shape[1] + second.shape[1], first.shape[2]
        self.scheme = " and ".join(half.scheme for half in halves)

    @property
    def stand_in(self) -> Codes:
        return Codes(torch.empty(self.shape[1:], dtype=torch.bfloat16, device="meta"))

    def expert(self, index: int) -> Codes:
        return Codes(torch.cat([part.expert(index).weight for part in self.parts]))
