"""The k-quants of ggml, from float weights: blocks of 256, in groups whose scales are integers too.

    q2_k, q4_k, q5_k   (d * scale) * q - (dmin * minimum)   q and both integers not negative
    q3_k, q6_k         (d * scale) * q                      q and scale of either sign

d and dmin are float16, one for each block. "rtn" gives every group its range, rounds the scales and minima to
integers, and rounds weights with what these stand for. "mse" searches the scale and minimum of a group with
the least squared error, as integers again after d and dmin are chosen.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ktops.formats.format import Codes
from ktops.formats.gguf_blocks import BLOCKS, GgufBlocks
from ktops.formats.integer import NUM_FITS, divide, fit, shrinking

NUM_RANGES = 10
"""Ranges that "mse" starts from: evenly, from all of a group's down to the ``smallest`` share of it."""

CHUNK_BLOCKS = 512
"""Blocks that are worked on at a time: their floats stay in a core's cache."""


@dataclass(frozen=True)
class Layout:
    """The numbers of a k-quant.

    Attributes:
        group: weights that share a scale.
        low, high: the least and the largest code.
        most: of the integers for scales and minima; scales are in [-most, most] where codes have signs.
        smallest: the share of a group's range that is worth a try.
        pack: (codes less low, :class:`Scales`) -> the parts of the blocks, uint8 [blocks, ...], in order.
    """

    group: int
    low: int
    high: int
    most: int
    smallest: float
    pack: Callable[[Tensor, "Scales"], tuple[Tensor, ...]]

    @property
    def has_minimum(self) -> bool:
        return self.low == 0


class Scales(NamedTuple):
    """Of blocks: d and dmin, float16 [blocks, 1, 1]; integers as float32 [blocks, groups, 1]."""

    d: Tensor
    scale: Tensor
    dmin: Tensor
    minimum: Tensor

    @property
    def step(self) -> Tensor:
        """Exact: 11 bits times 7."""
        return self.d.float() * self.scale

    @property
    def offset(self) -> Tensor:
        return self.dmin.float() * self.minimum


class KQuant(GgufBlocks):
    methods = ("rtn", "mse")

    def __init__(self, name: str, layout: Layout) -> None:
        super().__init__(name, *BLOCKS[name])
        self.layout = layout

    def check_written(self) -> None:
        """Nothing to check: the gguf package is not needed to quantize."""

    def quantize(self, weight: Tensor, group_size: int, method: str) -> Codes:
        rows = *weight.shape[:-1], self.row_elements(weight.shape[-1])
        groups = weight.reshape(-1, self.block // self.layout.group, self.layout.group)
        blocks = [self._blocks(chunk, method) for chunk in groups.split(CHUNK_BLOCKS)]
        return Codes(torch.cat(blocks).view(rows))

    def _blocks(self, groups: Tensor, method: str) -> Tensor:
        scales = rounded(*ranges(groups, self.layout), self.layout)
        if not bool((scales.d.isfinite() & scales.dmin.isfinite()).all()):
            low, high = groups.aminmax()
            raise ValueError(
                f"format {self.name!r} needs finite weights, with scales of groups up to {self.layout.most} "
                f"times the largest float16, 65504: got weights from {low:.3g} to {high:.3g}"
            )
        if method == "mse":
            scales = least_error(groups, scales, self.layout)
        codes = codes_of(groups, scales.step, scales.offset, self.layout) - self.layout.low
        return torch.cat(self.layout.pack(codes.flatten(1).to(torch.uint8), scales), dim=1)


def ranges(groups: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The step and the offset that reach the least and the largest weight of each group."""
    if not layout.has_minimum:
        step = groups.abs().amax(-1, keepdim=True) / layout.high
        return step, torch.zeros_like(step)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    low = low.clamp_max(0)
    return (high - low) / layout.high, -low


def rounded(step: Tensor, offset: Tensor, layout: Layout) -> Scales:
    """Steps and offsets of groups as integers times a d and a dmin."""
    d, dmin = (float16_above(x.abs().amax(1, keepdim=True) / layout.most) for x in (step, offset))
    scale, minimum = (divide(x, unit.float()).round_() for x, unit in ((step, d), (offset, dmin)))
    return Scales(d, scale, dmin, minimum)


def float16_above(x: Tensor) -> Tensor:
    """The least float16 that is not below x >= 0; tiny scales would become 0 otherwise."""
    nearest = x.half()
    return torch.where(nearest.float() < x, nearest.view(torch.int16) + 1, nearest.view(torch.int16)).view(
        torch.float16
    )


def codes_of(groups: Tensor, step: Tensor, offset: Tensor, layout: Layout) -> Tensor:
    """The nearest codes, as float32."""
    inverse = torch.where(step == 0, 0, 1 / step)
    return (groups + offset).mul_(inverse).round_().clamp_(layout.low, layout.high)


def squared_error(groups: Tensor, step: Tensor, offset: Tensor, layout: Layout) -> Tensor:
    """[blocks, groups, 1]"""
    codes = codes_of(groups, step, offset, layout)
    return codes.mul_(step).sub_(offset).sub_(groups).square_().sum(-1, keepdim=True)


def least_error(groups: Tensor, start: Scales, layout: Layout) -> Scales:
    """The best scales that were found, block by block not worse than those to start with."""
    found = neighbors(groups, rounded(*search(groups, layout), layout), layout)
    errors = (
        squared_error(groups, scales.step, scales.offset, layout).sum(1, keepdim=True)
        for scales in (found, start)
    )
    better = torch.lt(*errors)
    return Scales(*(torch.where(better, new, old) for new, old in zip(found, start, strict=True)))


def search(groups: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The step and the offset of each group with the least squared error, as if they were not rounded."""
    best = step, offset = ranges(groups, layout)
    least = squared_error(groups, *best, layout)
    for size in shrinking(NUM_RANGES, layout.smallest):
        for trial in trials(groups, step, offset, size, layout):
            error = squared_error(groups, *trial, layout)
            better = error < least
            best = torch.where(better, trial[0], best[0]), torch.where(better, trial[1], best[1])
            least = torch.minimum(error, least)
    return best


def trials(
    groups: Tensor, step: Tensor, offset: Tensor, size: float, layout: Layout
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of step and offset from a share of the range: of either sign, or fitted to its codes."""
    if not layout.has_minimum:
        yield step * size, offset
        yield step * -size, offset
        return
    middle = step * (layout.high / 2) - offset
    step = step * size
    offset = step * (layout.high / 2) - middle
    for _ in range(NUM_FITS):
        codes = codes_of(groups, step, offset, layout)
        step, zero = fit(groups, codes, step)
        offset = (step * zero).clamp_min(0)
    yield step, offset


def neighbors(groups: Tensor, scales: Scales, layout: Layout) -> Scales:
    """For each group the best of the integers around: both rounded to nearest need not be."""
    best, least = scales, squared_error(groups, scales.step, scales.offset, layout)
    lowest = 0 if layout.has_minimum else -layout.most
    minima = (-1, 0, 1) if layout.has_minimum else (0,)
    for up in range(-3, 4):
        for down in minima:
            trial = scales._replace(
                scale=(scales.scale + up).clamp_(lowest, layout.most),
                minimum=(scales.minimum + down).clamp_(0, layout.most),
            )
            error = squared_error(groups, trial.step, trial.offset, layout)
            better = error < least
            best = best._replace(
                scale=torch.where(better, trial.scale, best.scale),
                minimum=torch.where(better, trial.minimum, best.minimum),
            )
            least = torch.minimum(error, least)
    return best


def packed(numbers: Tensor, bits: int) -> Tensor:
    """uint8 [blocks, ..., P, M], of so many bits each -> [blocks, bytes]: number p from bit p * bits on."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[: numbers.shape[-2], None]
    return (numbers << shifts).sum(-2, dtype=torch.uint8).flatten(1)


def unsigned(integers: Tensor) -> Tensor:
    """float32 [blocks, groups, 1] -> uint8 [blocks, groups]"""
    return integers.squeeze(-1).to(torch.uint8)


def halves(*numbers: Tensor) -> Tensor:
    """float16 [blocks, 1, 1] each -> their bytes [blocks, ...]"""
    return torch.cat(numbers, dim=1).flatten(1).view(torch.uint8)


def six_bits(scales: Scales) -> Tensor:
    """[blocks, 12]: the first four scales and minima, with the upper bits of the others; their lower bits."""
    both = torch.stack([unsigned(scales.scale), unsigned(scales.minimum)], dim=1).unflatten(-1, (2, 4))
    first, last = both.unbind(2)
    return torch.cat([(first | last >> 4 << 6).flatten(1), packed(last & 15, 4)], dim=1)


def pack_q2(codes: Tensor, scales: Scales) -> tuple[Tensor, ...]:
    both = torch.stack([unsigned(scales.scale), unsigned(scales.minimum)], dim=1)
    return packed(both, 4), packed(codes.view(-1, 2, 4, 32), 2), halves(scales.d, scales.dmin)


def pack_q3(codes: Tensor, scales: Scales) -> tuple[Tensor, ...]:
    scale = unsigned(scales.scale + 32)
    lower, upper = packed((scale & 15).view(-1, 2, 8), 4), packed((scale >> 4).view(-1, 4, 4), 2)
    return (
        packed((codes >> 2).view(-1, 8, 32), 1),
        packed((codes & 3).view(-1, 2, 4, 32), 2),
        lower,
        upper,
        halves(scales.d),
    )


def pack_q4(codes: Tensor, scales: Scales) -> tuple[Tensor, ...]:
    return halves(scales.d, scales.dmin), six_bits(scales), packed(codes.view(-1, 4, 2, 32), 4)


def pack_q5(codes: Tensor, scales: Scales) -> tuple[Tensor, ...]:
    d, integers, lower = pack_q4(codes & 15, scales)
    return d, integers, packed((codes >> 4).view(-1, 8, 32), 1), lower


def pack_q6(codes: Tensor, scales: Scales) -> tuple[Tensor, ...]:
    lower, upper = packed((codes & 15).view(-1, 2, 2, 64), 4), packed((codes >> 4).view(-1, 2, 4, 32), 2)
    return lower, upper, scales.scale.squeeze(-1).to(torch.int8).view(torch.uint8), halves(scales.d)


LAYOUTS = {
    "q2_k": Layout(16, 0, 3, 15, 0.5, pack_q2),
    "q3_k": Layout(16, -4, 3, 31, 0.5, pack_q3),
    "q4_k": Layout(32, 0, 15, 63, 0.5, pack_q4),
    "q5_k": Layout(32, 0, 31, 63, 0.7, pack_q5),
    "q6_k": Layout(16, -32, 31, 127, 0.8, pack_q6),
}

FORMATS = tuple(KQuant(name, layout) for name, layout in LAYOUTS.items())
