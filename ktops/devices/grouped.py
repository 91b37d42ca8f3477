"""Products of rows that are sorted by expert, on an accelerator."""

from bisect import bisect_left, bisect_right
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ktops.devices.transfer import download, upload

ALIGNMENT = 16
"""Bytes to which grouped_mm requires the rows of its operands to be aligned."""


class Segments(NamedTuple):
    """Rows sorted by expert, as a slice of all positions.

    Attributes:
        bounds: on the host; segment g has the rows from bounds[g] to bounds[g + 1].
        ends: bounds[1:] as int32 on the device.
    """

    bounds: list[int]
    ends: Tensor

    def between(self, first: int, last: int) -> tuple[slice, "Segments"]:
        """Returns which segments have rows in [first, last), and these rows as segments from 0 on."""
        begin, end = bisect_right(self.bounds, first) - 1, bisect_left(self.bounds, last)
        bounds = [min(max(bound, first), last) - first for bound in self.bounds[begin : end + 1]]
        ends = self.ends[begin:end].clamp(max=last) - first
        return slice(begin, end), Segments(bounds, ends)

    def of_rows(self) -> Tensor:
        """Returns the segment of every row."""
        rows = torch.arange(self.bounds[-1], dtype=torch.int32, device=self.ends.device)
        return torch.bucketize(rows, self.ends, right=True)

    def multiply(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Multiplies the rows of each segment by the transpose of its weight, [R, K], [G, N, K] -> [R, N].

        Returns:
            Sums in float32 (float64 for float64). They were rounded to the dtype of the operands if the
            device cannot return them in float32.
        """
        dtype = accumulator(rows.dtype)
        if has_grouped_mm(rows, weight):
            return F.grouped_mm(rows, weight.mT, offs=self.ends).to(dtype)
        # Where torch has no such kernel, its own loop would wait for the device to learn the bounds.
        parts = rows.tensor_split(self.bounds[1:-1])
        products = [_product(part, w.mT, dtype) for part, w in zip(parts, weight, strict=True)]
        return torch.cat(products).to(dtype)


class Routes(NamedTuple):
    """The routes of a call on the device.

    Attributes:
        order: [T·K] routes sorted by expert, those with ids outside [0, E) last.
        experts: the experts that have routes, on the host.
        segments: the positions of each of them in ``order``.
    """

    order: Tensor
    experts: list[int]
    segments: Segments

    @classmethod
    def sort(cls, topk_ids: Tensor, num_experts: int) -> "Routes":
        """Sorts the routes. Waits for the device, since the host must know which weights to copy."""
        ids, order = clamp_ids(topk_ids.reshape(-1), num_experts).sort(stable=True)
        every = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
        (offsets,) = download([torch.searchsorted(ids, every, out_int32=True)])
        bounds = offsets.tolist()
        experts = [e for e in range(num_experts) if bounds[e] < bounds[e + 1]]
        ends = [bounds[e + 1] for e in experts]
        on_device = upload(torch.tensor(ends, dtype=torch.int32, device="cpu"), order.device)
        return cls(order, experts, Segments([0, *ends], on_device))


def clamp_ids(ids: Tensor, num_experts: int) -> Tensor:
    """Returns ids with num_experts in place of those outside [0, num_experts); waits for no device."""
    return ids.masked_fill((ids < 0) | (ids >= num_experts), num_experts)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which sums of this dtype are accumulated."""
    return torch.promote_types(dtype, torch.float32)


def has_grouped_mm(rows: Tensor, weight: Tensor) -> bool:
    """True if torch has a grouped kernel for these operands: bfloat16 on Hopper and data center Blackwell."""
    if rows.dtype != torch.bfloat16 or not _is_nvidia(rows.device):
        return False
    return torch.cuda.get_device_capability(rows.device)[0] in (9, 10) and is_aligned(weight)


def is_aligned(weight: Tensor) -> bool:
    """True if the rows of a weight, stored either way, and those of its product are aligned."""
    return all(size * weight.itemsize % ALIGNMENT == 0 for size in weight.shape[1:])


def _product(rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns rows @ weight, in ``dtype`` if the device has such a kernel."""
    if rows.dtype != dtype and _is_nvidia(rows.device):
        return torch.mm(rows, weight, out_dtype=dtype)
    return rows @ weight


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None
