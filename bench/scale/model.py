"""Predicts the time of one layer from measured parts.

An expert with n rows takes (c^p + m^p)^(1/p) seconds: c is the time of its products at the fraction of the
peak that n rows reach with weights in the caches, m the time to read its weights from memory, and p, fitted
to measurements, says how well the two overlap. A rank takes the sum over its experts, and the layer as long
as the slowest rank, then the exchange.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.layer import Variant
from bench.roofline import forward_work, training_work
from bench.scale.routing import traffic
from bench.shapes import Shape

ITEMSIZE = 2  # bytes of bfloat16
LORA_RANK = 16
"""The LoRA rank of training."""


class Curve:
    """A function through measured points, between which logarithms are interpolated.

    Below the first point it is constant. Beyond the last it is proportional.

    Example:
        >>> Curve({1: 2.0, 4: 8.0})(torch.tensor([0.5, 2.0, 8.0]))
        tensor([ 2.,  4., 16.], dtype=torch.float64)
    """

    def __init__(self, points: Mapping[int, float] | Mapping[float, float]) -> None:
        ordered = sorted(points.items())
        self.x, self.y = torch.tensor(ordered, dtype=torch.float64).log().T.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.double().clamp_min(1e-300).log().clamp_min(self.x[0])
        if len(self.x) == 1:
            return (self.y[0] + x - self.x[0]).exp()
        right = torch.searchsorted(self.x, x).clamp(1, len(self.x) - 1)
        x0, x1, y0, y1 = self.x[right - 1], self.x[right], self.y[right - 1], self.y[right]
        between = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        return torch.where(x > self.x[-1], self.y[-1] + x - self.x[-1], between).exp()

    def at(self, x: float) -> float:
        """Returns the value for one number."""
        return self(torch.tensor(float(x))).item()


def variant(mode: str) -> Variant:
    """Returns how a layer is called: training has adapters."""
    return Variant(LORA_RANK if mode == "training" else 0)


def expert_work(shape: Shape, mode: str) -> tuple[int, int, int]:
    """Returns (FLOPs of a row, bytes moved for an expert's weights and adapters, bytes of its adapters)."""
    single, how = replace(shape, num_experts=1, top_k=1), variant(mode)
    work = training_work if mode == "training" else forward_work
    moved = work(single, 0, 1, how, ITEMSIZE).bytes
    adapters = forward_work(single, 0, 1, how, ITEMSIZE).bytes
    adapters -= forward_work(single, 0, 1, replace(how, rank=0), ITEMSIZE).bytes
    return work(single, 1, 1, how, ITEMSIZE).flops, moved, adapters


def together(compute: Tensor, memory: float, overlap: float) -> Tensor:
    """Returns the seconds of an expert: (compute^p + memory^p)^(1/p), between the longer one and the sum."""
    return (compute**overlap + memory**overlap) ** (1 / overlap)


@dataclass(frozen=True)
class Engine:
    """What computes the experts of one rank.

    peak: FLOP/s of its cores. rows_at_peak: how many rows would take as long at the peak as the rows of an
    expert do whose weights are in the caches, per mode. bandwidth: bytes/s at which weights are read, per
    mode. call: seconds of a call without work, per mode. fill: seconds per byte of the adapters' gradients,
    of experts with tokens or without. overlap: p, per mode. around: seconds of what surrounds the exchange,
    by "collective mode" and elements of a rank's routes; around_scale: how many times as fast as measured.
    """

    peak: float
    rows_at_peak: dict[str, Curve]
    bandwidth: dict[str, float]
    call: dict[str, float]
    fill: float
    overlap: dict[str, float]
    around: dict[str, Curve]
    around_scale: float = 1.0

    def experts(self, shape: Shape, mode: str, counts: Tensor) -> Tensor:
        """Returns the seconds of a call, [...], for the rows of each of the rank's experts, [..., E]."""
        flops, moved, adapters = expert_work(shape, mode)
        rows = counts.clamp_min(1)
        compute = self.rows_at_peak[mode](rows) * flops / self.peak
        each = together(compute, moved / self.bandwidth[mode], self.overlap[mode])
        fixed = self.call[mode] + counts.shape[-1] * adapters * self.fill
        return torch.where(counts > 0, each, 0.0).sum(-1) + fixed

    def surround(self, collective: str, shape: Shape, mode: str, tokens: int) -> float:
        """Returns the seconds to sort, move and weight the routes of a rank's tokens."""
        curve = self.around[f"{collective} {mode}"]
        least = curve.at(0)
        return least + (curve.at(tokens * shape.top_k * shape.hidden_size) - least) / self.around_scale


@dataclass(frozen=True)
class Prediction:
    """Seconds of one layer: the slowest rank's experts, what surrounds the exchange, and the exchange."""

    experts: float
    around: float = 0.0
    exchange: float = 0.0

    @property
    def seconds(self) -> float:
        return self.experts + self.around + self.exchange


@dataclass(frozen=True)
class Gloo:
    """Exchanges as gloo makes them between processes, measured between two; links are no bottleneck.

    all_reduce is a ring: of 2(N - 1) steps each moves a part of 1/N. In all_to_all, ranks send to all others
    at once. The measured sizes are those of a rank's tensor, half of which leaves the rank.
    """

    curves: dict[str, Curve]

    def all_reduce(self, size: float, ranks: int) -> float:
        """Returns the seconds to sum ``size`` bytes over the ranks."""
        return (ranks - 1) * self.curves["all_reduce"].at(2 * size / ranks) if ranks > 1 else 0.0

    def all_to_all(self, sent: Tensor) -> Tensor:
        """Returns the seconds, [...], for the bytes that each rank sends to each, [..., from, to]."""
        ranks = sent.shape[-1]
        if ranks == 1:
            return sent.new_zeros(sent.shape[:-2], dtype=torch.float64)
        apart = sent.double() * (1 - torch.eye(ranks, dtype=torch.float64))
        most = torch.maximum(apart.sum(-1), apart.sum(-2)).amax(-1)
        curve = self.curves["all_to_all"]
        return curve(2 * most) + (ranks - 2) * curve.at(0)


@dataclass(frozen=True)
class Links:
    """Exchanges at the speed of links: what hardware allows if software costs nothing but its latency.

    between_sockets: bytes/s from one socket of a host to another. between_hosts: bytes/s of a host's adapter.
    latency: seconds of a message. sockets: ranks per host.
    """

    between_sockets: float
    between_hosts: float
    latency: float
    sockets: int

    def all_reduce(self, size: float, ranks: int) -> float:
        """Returns the seconds of a ring through all sockets; between hosts it crosses each adapter once."""
        if ranks == 1:
            return 0.0
        slowest = self.between_sockets if ranks <= self.sockets else self.between_hosts
        if ranks > self.sockets > 1:
            slowest = min(self.between_sockets, self.between_hosts)
        return 2 * (ranks - 1) * (size / ranks / slowest + self.latency)

    def all_to_all(self, sent: Tensor) -> Tensor:
        """Returns the seconds, [...], for the bytes that each rank sends to each, [..., from, to]."""
        ranks = sent.shape[-1]
        sent = sent.double()
        host = torch.arange(ranks) // self.sockets
        inside = (host[:, None] == host[None]).double()
        pairs = (sent * inside * (1 - torch.eye(ranks, dtype=torch.float64))).amax((-2, -1))
        member = (host[:, None] == host.unique()[None]).double()
        outside = sent * (1 - inside)
        leaves, enters = outside.sum(-1) @ member, outside.sum(-2) @ member
        adapters = torch.maximum(leaves, enters).amax(-1)
        seconds = torch.maximum(pairs / self.between_sockets, adapters / self.between_hosts)
        return seconds + (self.latency if ranks > 1 else 0.0)


def one_process(engine: Engine, shape: Shape, mode: str, counted: Tensor) -> Prediction:
    """Predicts a layer whose experts are all in one process.

    Args:
        counted: routes, [draws, ranks, E], see :func:`bench.scale.routing.counts`.
    """
    return Prediction(engine.experts(shape, mode, counted.sum(1)).mean().item())


def all_reduce(engine: Engine, network, shape: Shape, mode: str, tokens: int, counted: Tensor) -> Prediction:
    """Predicts expert parallelism by all_reduce: all ranks have all tokens, and sum their results.

    Forward sums [T, H]; backward the gradients of hidden_states, [T, H], and of topk_weights, [T, K].
    """
    ranks = counted.shape[1]
    rows = counted.sum(1).unflatten(1, (ranks, -1))
    experts = engine.experts(shape, mode, rows).amax(1).mean().item()
    hidden, weights = (ITEMSIZE * tokens * size for size in (shape.hidden_size, shape.top_k))
    exchange = network.all_reduce(hidden, ranks)
    if mode == "training":
        exchange += network.all_reduce(hidden, ranks) + network.all_reduce(weights, ranks)
    return Prediction(experts, engine.surround("all_reduce", shape, mode, tokens), exchange)


def all_to_all(engine: Engine, network, shape: Shape, mode: str, tokens: int, counted: Tensor) -> Prediction:
    """Predicts expert parallelism by all_to_all: each rank has a part of the tokens.

    Forward sends the number of routes to each expert, a row of H for each route, and the rows back. Backward
    sends the gradients of the same rows.
    """
    ranks = counted.shape[1]
    rows = counted.sum(1).unflatten(1, (ranks, -1))
    experts = engine.experts(shape, mode, rows).amax(1).mean().item()
    sent = traffic(counted) * shape.hidden_size * ITEMSIZE
    there, back = network.all_to_all(sent), network.all_to_all(sent.mT)
    numbers = network.all_to_all(torch.full((ranks, ranks), 8.0 * shape.num_experts / ranks))
    passes = 2 if mode == "training" else 1
    exchange = numbers.item() + passes * (there + back).mean().item()
    around = engine.surround("all_to_all", shape, mode, math.ceil(tokens / ranks))
    return Prediction(experts, around, exchange)
