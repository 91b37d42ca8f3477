"""Measures the parts of a layer's time: experts from caches and from memory, calls, exchanges, copies."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from bench.layer import Layer
from bench.scale import routing
from bench.scale.ranks import Experts, Identity, Ranks, clock, expert_parallel, pin, run
from bench.shapes import PLAIN, Shape

RANK = 16
"""The LoRA rank of training."""
MODES = ("forward", "training")
COLLECTIVES = ("all_reduce", "all_to_all")

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
COLD_ROWS = ROWS[:9]
SIZES = tuple(4 << 2 * power for power in range(5, 13))
TOKENS = (1, 16, 128, 512, 1024, 2048)
_COPIED_BYTES = 256 << 20
SECONDS = 0.3
"""How long a part is measured by default."""

_TIMES = 5  # at least


def key(row: dict) -> tuple:
    """Returns what distinguishes the rows of one result file."""
    return tuple(row[name] for name in ("kind", "name", "threads", "size", "shape"))


def part(shape: Shape, ranks: int, rank: int, seed: int) -> Experts:
    """Returns the experts that a rank holds, all different from those of other ranks."""
    layer = Layer(replace(shape, num_experts=shape.num_experts // ranks), seed + rank)
    return Experts(layer.weights(PLAIN), layer.adapters(RANK))


def whole(shape: Shape, ranks: int, seed: int) -> Experts:
    """Returns the experts of all ranks."""
    parts = [part(shape, ranks, rank, seed) for rank in range(ranks)]
    weights = {name: torch.cat([p.weights.pop(name) for p in parts]) for name in list(parts[0].weights)}
    adapters = {name: torch.cat([p.adapters[name].detach() for p in parts]) for name in parts[0].adapters}
    return Experts(weights, {name: tensor.requires_grad_() for name, tensor in adapters.items()})


def some(experts: Experts, first: int, number: int) -> Experts:
    """Returns some of the experts, as views of the same memory."""
    taken = slice(first, first + number)
    adapters = {name: tensor.detach()[taken].requires_grad_() for name, tensor in experts.adapters.items()}
    return Experts({name: tensor[taken] for name, tensor in experts.weights.items()}, adapters)


def tokens(shape: Shape, topk_ids: Tensor, seed: int) -> tuple[Tensor, ...]:
    """Returns (hidden_states, topk_ids, topk_weights, grad_output) for given experts of tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(torch.bfloat16)

    hidden_states, grad_output = (normal(topk_ids.shape[0], shape.hidden_size) for _ in range(2))
    return hidden_states, topk_ids, normal(*topk_ids.shape).softmax(1), grad_output


def adapters_of(experts: Experts, mode: str) -> Experts:
    """Returns the experts as the mode calls them: forward has no adapters."""
    return experts if mode == "training" else Experts(experts.weights, {})


def fastest(calls: list[Callable[[], object]], seconds: float) -> float:
    """Returns the mean over calls of the fastest of several times; they take turns for some seconds."""
    calls[-1]()  # to warm up
    best, spent, made = [float("inf")] * len(calls), 0.0, 0
    now = clock(torch.get_num_threads())
    while made < max(_TIMES, 2 * len(calls)) or spent < seconds:
        index = made % len(calls)
        start = now()
        calls[index]()
        took = now() - start
        best[index], spent, made = min(best[index], took), spent + took, made + 1
    return sum(best) / len(best)


def _even(shape: Shape, rows: int) -> tuple[int, list[Tensor]]:
    """Returns (experts that a call uses, topk_ids of calls that use other experts each)."""
    used = 2 * shape.top_k if 2 * shape.top_k <= shape.num_experts else shape.top_k
    ids = torch.arange(rows * used).view(-1, shape.top_k) % used
    return used, [ids + first for first in range(0, shape.num_experts - used + 1, used)]


def _calls(shape: Shape, mode: str, experts: Experts, chosen: list[Tensor], seconds: float) -> float:
    """Returns the seconds of the fastest call; ``chosen``: topk_ids of calls, which take turns."""
    layer = adapters_of(experts, mode)
    trained = list(layer.adapters.values())
    inputs = [tokens(shape, ids, seed) for seed, ids in enumerate(chosen)]
    return fastest([partial(run, layer.forward, mode, given, trained) for given in inputs], seconds)


def compute(shape: Shape, experts: Experts, threads: int, seconds: float) -> Iterator[dict]:
    """Yields rows of calls on the threads of this process, in which each expert has ``size`` rows.

    call: a tiny layer. single: one expert of the whole layer, another one in each call. hot: a layer of one
    expert, whose weights stay in the caches. cold: ``experts`` of the whole layer, others in each call.
    """
    tiny = Shape("tiny", 64, 32, 1, 1)
    one, single = replace(shape, num_experts=1, top_k=1), torch.zeros(1, 1, dtype=torch.int64)
    each = [single + expert for expert in range(shape.num_experts)]
    for mode in MODES:
        row = {"name": mode, "threads": threads, "size": 1, "experts": 1}
        took = _calls(tiny, mode, part(tiny, 1, 0, 0), [single], seconds)
        yield row | {"kind": "call", "seconds": took}
        took = _calls(replace(shape, top_k=1), mode, experts, each, seconds)
        yield row | {"kind": "single", "seconds": took}
        for size in ROWS:
            took = _calls(one, mode, some(experts, 0, 1), [single.expand(size, 1).contiguous()], seconds)
            yield row | {"kind": "hot", "size": size, "seconds": took}
        for size in COLD_ROWS:
            used, chosen = _even(shape, size)
            took = _calls(shape, mode, experts, chosen, seconds)
            yield row | {"kind": "cold", "size": size, "experts": used, "seconds": took}


def copy(threads: int, seconds: float) -> Iterator[dict]:
    """Yields the time of a large copy."""
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8)
    target = torch.ones_like(source)
    took = fastest([partial(target.copy_, source)], seconds)
    yield {"kind": "copy", "name": "copy", "threads": threads, "size": _COPIED_BYTES, "seconds": took}


def exchange(collective: str, data: Tensor) -> None:
    """Sums data over the ranks in place, or sends an equal part of it to each rank, to a new place."""
    if collective == "all_reduce":
        dist.all_reduce(data)
    else:
        dist.all_to_all_single(torch.empty_like(data), data)


def exchanges(ranks: Ranks, seconds: float) -> Iterator[dict]:
    """Yields the time of exchanges by size, the bytes of each rank's tensor."""
    for size in SIZES:
        data = torch.zeros(size // 2, dtype=torch.bfloat16)
        for name in COLLECTIVES:
            row = {"kind": "exchange", "name": name, "threads": ranks.size, "size": size}
            yield row | {"seconds": ranks.fastest(partial(exchange, name, data), seconds)}


def around(shape: Shape, ranks: Ranks, seconds: float) -> Iterator[dict]:
    """Yields the time of what surrounds experts and exchange: sorting, moving, weighting the routes.

    Every rank runs all of it at once, with experts that return their tokens, and exchanges with nobody.
    size: the tokens of each rank.
    """
    for collective in COLLECTIVES:
        call = expert_parallel(collective, Identity(shape.num_experts), ranks, alone=True)
        for mode in MODES:
            for number in TOKENS:
                (ids,) = routing.draw(shape, number, 1, seed=ranks.rank)
                made = partial(run, call, mode, tokens(shape, ids, 0), [])
                took = ranks.fastest(made, seconds, clock(len(ranks.cpus)))
                row = {"kind": "around", "name": f"{collective} {mode}", "threads": len(ranks.cpus)}
                yield row | {"size": number, "seconds": took}


def measure(shape: Shape, experts: Experts | None, ranks: Ranks, seconds: float = SECONDS) -> list[dict]:
    """Returns the rows of all parts on rank 0; on others, those of what all ranks do together.

    Args:
        experts: those of all ranks, on rank 0.
        seconds: how long to measure each part.
    """
    rows: list[dict] = []
    if experts is not None:
        for threads in ranks.thread_numbers:
            pin(ranks.host_cpus[:threads])
            rows += compute(shape, experts, threads, seconds)
            rows += copy(threads, seconds)
        pin(ranks.cpus)
    rows += exchanges(ranks, seconds)
    rows += around(shape, ranks, seconds)
    return [row | {"shape": shape.name} for row in rows]
