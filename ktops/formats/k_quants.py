"""Quantizes to the k-quants of ggml: blocks of 256 weights, in groups whose scales are integers too.

    q2_k, q4_k, q5_k   (d * scale) * q - (dmin * minimum)   q, scale and minimum are not negative
    q3_k, q6_k         (d * scale) * q                      q and scale have either sign

d and dmin are float16, one per block. "rtn" covers the range of every group, rounds the scales and minima to
integers, and rounds the weights with the rounded values. "mse" searches for the scale and minimum of each
group with the least squared error, and searches again among integers once d and dmin are chosen.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ktops.formats.format import Codes
from ktops.formats.gguf_blocks import BLOCKS, GgufBlocks
from ktops.formats.integer import NUM_FITS, fit
from ktops.formats.rounding import divide, shrinking
from ktops.formats.sums import ordered_sum

NUM_RANGES = 10
"""Number of ranges "mse" starts from, evenly spaced from the full range down to the fraction ``smallest``."""

CHUNK_BLOCKS = 512
"""Number of blocks processed at a time, so that their floats stay in a core's cache."""


@dataclass(frozen=True)
class Layout:
    """The parameters of a k-quant.

    Attributes:
        group: number of weights that share a scale.
        low, high: the smallest and the largest code.
        most: the largest integer scale or minimum; scales are in [-most, most] if codes are signed.
        smallest: the smallest fraction of a group's range worth trying.
        pack: (codes - low, :class:`Scales`) -> the parts of the blocks, uint8 [blocks, ...], in order.
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
    """The scales of blocks: d and dmin, float16 [blocks, 1, 1]; integers as float32 [blocks, groups, 1]."""

    d: Tensor
    scale: Tensor
    dmin: Tensor
    minimum: Tensor

    @property
    def step(self) -> Tensor:
        """d * scale, which is exact: 11 bits times 7 bits."""
        return self.d.float() * self.scale

    @property
    def offset(self) -> Tensor:
        return self.dmin.float() * self.minimum


class KQuant(GgufBlocks):
    methods = ("rtn", "mse")

    def __init__(self, name: str, layout: Layout) -> None:
        super().__init__(name, *BLOCKS[name])
        self.layout = layout

    def quantize_reference(self, weight: Tensor, group_size: int, method: str) -> Codes:
        rows = *weight.shape[:-1], self.row_elements(weight.shape[-1])
        groups = weight.reshape(-1, self.block // self.layout.group, self.layout.group)
        blocks = [self._blocks(chunk, method) for chunk in groups.split(CHUNK_BLOCKS)]
        return Codes(torch.cat(blocks).view(rows))

    @property
    def scale_limit(self) -> str:
        return f"group scales up to {self.layout.most} times the largest float16, 65504"

    def _blocks(self, groups: Tensor, method: str) -> Tensor:
        scales = rounded(*ranges(groups, self.layout), self.layout)
        if method == "mse":
            scales = least_error(groups, scales, self.layout)
        codes = codes_of(groups, scales.step, scales.offset, self.layout) - self.layout.low
        return torch.cat(self.layout.pack(codes.flatten(1).to(torch.uint8), scales), dim=1)


def ranges(groups: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Returns the step and the offset that cover the smallest and the largest weight of each group."""
    if not layout.has_minimum:
        step = groups.abs().amax(-1, keepdim=True) / layout.high
        return step, torch.zeros_like(step)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    low = low.clamp_max(0)
    return (high - low) / layout.high, -low


def rounded(step: Tensor, offset: Tensor, layout: Layout) -> Scales:
    """Rounds the steps and offsets of groups to integers times d and dmin."""
    d, dmin = (float16_above(x.abs().amax(1, keepdim=True) / layout.most) for x in (step, offset))
    scale, minimum = (divide(x, unit.float()).round_() for x, unit in ((step, d), (offset, dmin)))
    return Scales(d, scale, dmin, minimum)


def float16_above(x: Tensor) -> Tensor:
    """Rounds x >= 0 up to float16, because rounding to nearest would turn tiny scales into 0."""
    nearest = x.half()
    return torch.where(nearest.float() < x, nearest.view(torch.int16) + 1, nearest.view(torch.int16)).view(
        torch.float16
    )


def codes_of(groups: Tensor, step: Tensor, offset: Tensor, layout: Layout) -> Tensor:
    """Returns the nearest codes, as float32."""
    inverse = torch.where(step == 0, 0, 1 / step)
    return (groups + offset).mul_(inverse).round_().clamp_(layout.low, layout.high)


def squared_error(groups: Tensor, step: Tensor, offset: Tensor, layout: Layout) -> Tensor:
    """Returns the squared error of each group, [blocks, groups, 1]."""
    codes = codes_of(groups, step, offset, layout)
    return ordered_sum(codes.mul_(step).sub_(offset).sub_(groups).square_())


def least_error(groups: Tensor, start: Scales, layout: Layout) -> Scales:
    """Returns the best scales found; no block is worse than with the initial scales."""
    found = neighbors(groups, rounded(*search(groups, layout), layout), layout)
    errors = (
        ordered_sum(squared_error(groups, scales.step, scales.offset, layout).mT) for scales in (found, start)
    )
    better = torch.lt(*errors)
    return Scales(*(torch.where(better, new, old) for new, old in zip(found, start, strict=True)))


def search(groups: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Returns the unrounded step and offset of each group with the least squared error."""
    best = step, offset = ranges(groups, layout)
    least = squared_error(groups, *best, layout)
    for size in shrinking(NUM_RANGES, layout.smallest):
        for trial in trials(groups, step, offset, size, layout):
            error = squared_error(groups, *trial, layout)
            better = error < least
            best = torch.where(better, trial[0], best[0]), torch.where(better, trial[1], best[1])
            least = torch.where(better, error, least)
    return best


def trials(
    groups: Tensor, step: Tensor, offset: Tensor, size: float, layout: Layout
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields pairs of step and offset for a fraction of the range: of either sign, or fitted to its codes."""
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
    """Returns the best nearby integers for each group; rounding both to nearest may not be optimal."""
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
            least = torch.where(better, error, least)
    return best


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Packs uint8 [blocks, ..., P, M] into [blocks, bytes]; number p starts at bit p * bits."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[: numbers.shape[-2], None]
    return (numbers << shifts).sum(-2, dtype=torch.uint8).flatten(1)


def unsigned(integers: Tensor) -> Tensor:
    """Converts float32 [blocks, groups, 1] to uint8 [blocks, groups]."""
    return integers.squeeze(-1).to(torch.uint8)


def halves(*numbers: Tensor) -> Tensor:
    """Returns the bytes [blocks, ...] of numbers that are float16 [blocks, 1, 1] each."""
    return torch.cat(numbers, dim=1).flatten(1).view(torch.uint8)


def six_bits(scales: Scales) -> Tensor:
    """Packs into [blocks, 12] the first four scales and minima with the upper bits of the others, then the
    lower bits of the others.
    """
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
