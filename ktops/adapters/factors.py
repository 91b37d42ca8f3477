"""Factors: the low-rank update of a weight, which is read when it is needed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PROJECTIONS = ("gate", "up", "down")
"""The projections of an expert, with gate and up separate."""


@dataclass(frozen=True)
class Factors:
    """The update ``scaling * B @ A`` of a weight [out, in], or of the weights [E, out, in] of all experts.

    Attributes:
        rank, out_features, in_features: r, out, in.
        scaling: as PEFT computes it.
        dtype: of A and B.
        load: returns A [r, in] and B [out, r]; for experts [E, r, in] and [E, out, r].
        num_experts: E; None for a single weight.
    """

    rank: int
    out_features: int
    in_features: int
    scaling: float
    dtype: torch.dtype
    load: Callable[[], tuple[Tensor, Tensor]]
    num_experts: int | None = None

    def scaled(self, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        """Returns A and B of another rank and scaling, with the same product.

        The rank is padded with zeros. B is multiplied by the ratio of the scalings, in float32 unless the
        product is exact.
        """
        a, b = self.load()
        factor = self.scaling / scaling
        if factor != 1:
            b = (b if is_exact(factor) else b.to(torch.promote_types(b.dtype, torch.float32))) * factor
        more = rank - self.rank
        if more:
            a, b = (
                torch.nn.functional.pad(tensor, pad) for tensor, pad in ((a, (0, 0, 0, more)), (b, (0, more)))
            )
        return a, b

    def scaled_dtypes(self, scaling: float) -> tuple[torch.dtype, torch.dtype]:
        """Returns the dtypes of the tensors that :meth:`scaled` returns."""
        exact = is_exact(self.scaling / scaling)
        return self.dtype, self.dtype if exact else torch.promote_types(self.dtype, torch.float32)


def is_exact(factor: float) -> bool:
    """True if multiplying by the factor only changes sign and exponent."""
    return abs(math.frexp(factor)[0]) == 0.5


def rows(whole: Factors, begin: int, end: int) -> Factors:
    """Returns the update of the rows [begin, end) of a weight."""

    def load() -> tuple[Tensor, Tensor]:
        a, b = whole.load()
        return a, b[..., begin:end, :]

    return replace(whole, out_features=end - begin, load=load)


def stacked(gate: Factors, up: Factors) -> Factors:
    """Returns the update of two weights stacked by rows; its rank is the sum of theirs."""

    def load() -> tuple[Tensor, Tensor]:
        gate_a, gate_b = gate.load()
        up_a, up_b = up.scaled(up.rank, gate.scaling)
        shape = (*gate_b.shape[:-2], gate.out_features + up.out_features, gate.rank + up.rank)
        b = gate_b.new_zeros(shape, dtype=dtype)
        b[..., : gate.out_features, : gate.rank] = gate_b
        b[..., gate.out_features :, gate.rank :] = up_b
        return torch.cat([gate_a.to(dtype), up_a.to(dtype)], dim=-2), b

    dtype = torch.promote_types(gate.dtype, up.scaled_dtypes(gate.scaling)[1])
    dtype = torch.promote_types(dtype, up.dtype)
    rank, out_features = gate.rank + up.rank, gate.out_features + up.out_features
    return replace(gate, rank=rank, out_features=out_features, dtype=dtype, load=load)


def weighted_sum(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """Returns the sum of several updates of a weight, each with its own factor; exact, the ranks add up."""
    weighted = [replace(part, scaling=factor * part.scaling) for factor, part in parts]
    first = weighted[0]
    if len(weighted) == 1 and first.scaling > 0:
        return first
    scaling = max(abs(part.scaling) for part in weighted)
    dtype = first.dtype
    for part in weighted:
        for other in part.scaled_dtypes(scaling):
            dtype = torch.promote_types(dtype, other)

    def load() -> tuple[Tensor, Tensor]:
        pairs = [part.scaled(part.rank, scaling) for part in weighted]
        return (
            torch.cat([a.to(dtype) for a, _ in pairs], dim=-2),
            torch.cat([b.to(dtype) for _, b in pairs], dim=-1),
        )

    return replace(first, rank=sum(part.rank for part in weighted), scaling=scaling, dtype=dtype, load=load)


def zeros(rank: int, out_features: int, in_features: int, like: Factors) -> Factors:
    """Returns an update that changes nothing, for as many experts as ``like``."""

    def load() -> tuple[Tensor, Tensor]:
        experts = () if like.num_experts is None else (like.num_experts,)
        return (
            torch.zeros(*experts, rank, in_features, dtype=like.dtype),
            torch.zeros(*experts, out_features, rank, dtype=like.dtype),
        )

    return replace(like, rank=rank, out_features=out_features, in_features=in_features, load=load)
