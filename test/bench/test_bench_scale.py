"""``bench.scale``: drawn routings, formulas and fitted parts against brute force; its commands; its page."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from bench.scale import machines, model, parts, predict, routing
from bench.scale.model import Curve, Engine, Gloo, Links
from bench.shapes import Shape

SMALL = Shape("small", 64, 32, 8, 2)


def engine(**changed) -> Engine:
    """A processor that reads slowly and computes fast, with a different figure for everything."""
    made = Engine(
        peak=2e9,
        rows_at_peak={mode: Curve({1: 8.0, 8: 10.0, 64: 70.0}) for mode in parts.MODES},
        bandwidth={"forward": 1e9, "training": 0.7e9},
        call={"forward": 1e-5, "training": 3e-5},
        fill=2e-9,
        overlap={"forward": 2.0, "training": 4.0},
        around={f"{c} {m}": Curve({128: 1e-5, 4096: 8e-5}) for c in parts.COLLECTIVES for m in parts.MODES},
    )
    return replace(made, **changed)


def routings(num_experts: int, top_k: int, tokens: int) -> list[tuple[tuple[int, ...], ...]]:
    """All ways in which tokens can choose experts."""
    return list(itertools.product(itertools.combinations(range(num_experts), top_k), repeat=tokens))


@pytest.mark.parametrize(("tokens", "ranks_"), [(1, 2), (2, 2), (2, 4), (3, 2)])
def test_expected_load_of_the_busiest_rank(tokens, ranks_):
    """If all experts are alike, every way to choose them is equally likely."""
    shape = Shape("", 1, 1, 4, 2)

    def busiest(chosen) -> int:
        return max(sum(e * ranks_ // 4 == rank for token in chosen for e in token) for rank in range(ranks_))

    every = [busiest(chosen) for chosen in routings(4, 2, tokens)]
    expected = sum(every) / len(every)
    draws = 4000
    counted = routing.counts(routing.draw(shape, tokens, draws), 4, 1)
    drawn = counted.sum(1).unflatten(1, (ranks_, -1)).sum(2).amax(1).double()
    deviation = math.sqrt(sum((x - expected) ** 2 for x in every) / len(every) / draws)
    assert abs(drawn.mean().item() - expected) <= 4 * deviation


def test_popularity():
    """With one expert per token and skew 1, experts are chosen in proportion to 1, 1/2, 1/3, 1/4."""
    shape, draws = Shape("", 1, 1, 4, 1), 400
    ids = routing.draw(shape, 200, draws, skew=1.0)
    loads = routing.counts(ids, 4, 1).sum(1).double().sort(dim=1, descending=True).values.mean(0) / 200
    expected = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4], dtype=torch.float64)
    torch.testing.assert_close(loads, expected / expected.sum(), rtol=0.0, atol=0.01)


def test_no_token_chooses_an_expert_twice():
    ids = routing.draw(SMALL, 50, 20, skew=2.0)
    assert ids.shape == (20, 50, 2)
    assert (ids[..., 0] != ids[..., 1]).all()
    assert ids.min() == 0 and ids.max() == 7


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_counts_and_traffic(tokens):
    ids = routing.draw(SMALL, tokens, 3)
    counted = routing.counts(ids, 8, 4)
    expected = torch.zeros(3, 4, 8, dtype=torch.int64)
    for draw in range(3):
        for source, part in enumerate(torch.arange(tokens).tensor_split(4)):
            for token in part.tolist():
                for expert in ids[draw, token].tolist():
                    expected[draw, source, expert] += 1
    assert counted.equal(expected)
    assert routing.traffic(counted)[1, 2, 3] == expected[1, 2, 6] + expected[1, 2, 7]


def test_curve():
    curve = Curve({4: 8.0, 1: 2.0, 16: 8.0})
    assert [curve.at(x) for x in (0, 0.5, 1, 2, 4, 8, 16, 32)] == pytest.approx([2, 2, 2, 4, 8, 8, 8, 16])
    assert [Curve({2: 3.0}).at(x) for x in (1, 2, 4)] == pytest.approx([3, 3, 6])


@pytest.mark.parametrize("mode", parts.MODES)
def test_seconds_of_a_rank(mode):
    """Two experts idle, the others with different numbers of rows, summed one by one."""
    rows, made = [0, 1, 5, 0, 8, 64, 200, 2], engine()
    weights, adapters = 2 * 3 * 64 * 32, 2 * 16 * (64 + 2 * 32 + 32 + 64)
    passes = 2 if mode == "training" else 1
    moved = passes * weights + (3 * adapters if mode == "training" else 0)
    flops = 2 * 3 * 64 * 32 * passes + (3 * 2 * adapters // 2 if mode == "training" else 0)
    assert model.expert_work(SMALL, mode) == (flops, moved, adapters if mode == "training" else 0)
    p, total = made.overlap[mode], made.call[mode]
    if mode == "training":
        total += 8 * adapters * made.fill
    for n in rows:
        if n:
            compute = made.rows_at_peak[mode].at(n) * flops / made.peak
            total += (compute**p + (moved / made.bandwidth[mode]) ** p) ** (1 / p)
    assert made.experts(SMALL, mode, torch.tensor(rows)).item() == pytest.approx(total)


@pytest.mark.parametrize("mode", parts.MODES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 2), (3, 4), (40, 2)])
def test_the_slowest_rank_and_the_exchange(mode, tokens, size):
    """Every rank of every draw by itself; the mean over draws of the slowest one."""
    ids, made = routing.draw(SMALL, tokens, 5), engine()
    counted = routing.counts(ids, 8, size)
    gloo = Gloo({"all_reduce": Curve({1: 1e-5, 1000: 2e-5}), "all_to_all": Curve({1: 2e-5, 500: 3e-5})})
    slowest, there_and_back = [], []
    for draw in ids:
        loads = torch.bincount(draw.flatten(), minlength=8).view(size, -1)
        slowest.append(max(made.experts(SMALL, mode, load).item() for load in loads))
        sent = [[0] * size for _ in range(size)]
        for source, part in enumerate(draw.tensor_split(size)):
            for expert in part.flatten().tolist():
                sent[source][expert * size // 8] += 64 * 2
        leaves = [sum(row) - row[rank] for rank, row in enumerate(sent)]
        enters = [sum(row[rank] for row in sent) - sent[rank][rank] for rank in range(size)]
        curve = gloo.curves["all_to_all"]
        there_and_back.append(2 * (curve.at(2 * max(leaves + enters)) + (size - 2) * curve.at(0)))
    mean, passes = sum(slowest) / 5, 2 if mode == "training" else 1

    summed = model.all_reduce(made, gloo, SMALL, mode, tokens, counted)
    sums = [tokens * 64 * 2] * passes + ([tokens * 2 * 2] if mode == "training" else [])
    assert summed.experts == pytest.approx(mean)
    assert summed.exchange == pytest.approx(sum(gloo.all_reduce(nbytes, size) for nbytes in sums))
    assert summed.around == made.surround("all_reduce", SMALL, mode, tokens)

    moved = model.all_to_all(made, gloo, SMALL, mode, tokens, counted)
    numbers = gloo.all_to_all(torch.full((size, size), 8.0 * 8 / size)).item()
    assert moved.experts == pytest.approx(mean)
    assert moved.exchange == pytest.approx(numbers + passes * sum(there_and_back) / 5)
    assert moved.around == made.surround("all_to_all", SMALL, mode, math.ceil(tokens / size))
    assert moved.seconds == moved.experts + moved.around + moved.exchange


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_gloo_sums_in_a_ring(size):
    """A ring with real data: parts travel N - 1 steps as sums, then N - 1 steps as results."""
    length, latency, rate = 24, 0.5, 10.0
    data = [[float(rank * length + i) for i in range(length)] for rank in range(size)]
    expected = [sum(column) for column in zip(*data, strict=True)]
    bounds = [length * i // size for i in range(size + 1)]
    seconds, ring = 0.0, range(size)
    for step in range(2 * (size - 1)):
        chosen = [(rank - step) % size for rank in ring]
        moved = [data[rank][bounds[c] : bounds[c + 1]] for rank, c in zip(ring, chosen, strict=True)]
        for rank in ring:
            part, target = slice(bounds[chosen[rank]], bounds[chosen[rank] + 1]), data[(rank + 1) % size]
            old = [0.0] * length if step >= size - 1 else target
            target[part] = [a + b for a, b in zip(moved[rank], old[part], strict=True)]
        seconds += latency + length / size / rate
    assert all(row == expected for row in data)

    class Line:
        def at(self, nbytes: float) -> float:
            return 2 * (latency + nbytes / 2 / rate)  # two steps between two ranks, half in each

    assert Gloo({"all_reduce": Line()}).all_reduce(length, size) == pytest.approx(seconds)
    assert Links(rate, rate, latency, 1).all_reduce(length, size) == pytest.approx(seconds)


def test_nothing_is_exchanged_with_oneself():
    alone = torch.tensor([[7.0]])
    for network in (Gloo({name: Curve({1: 1.0}) for name in parts.COLLECTIVES}), Links(1.0, 1.0, 1.0, 1)):
        assert network.all_reduce(100, 1) == 0
        assert network.all_to_all(alone).item() == 0


@pytest.mark.parametrize("sockets", [1, 2, 4])
def test_links(sockets):
    """The busiest pair of sockets, or the busiest adapter of a host if that takes longer."""
    generator = torch.Generator().manual_seed(sockets)
    sent = torch.randint(0, 1000, (3, 4, 4), generator=generator)
    fast, slow = 70.0, 30.0
    for draw, seconds in zip(sent.tolist(), Links(fast, slow, 0.25, sockets).all_to_all(sent), strict=True):
        pairs, leaves, enters = [0.0], [0.0] * 4, [0.0] * 4
        for a in range(4):
            for b in range(4):
                if a // sockets != b // sockets:
                    leaves[a // sockets] += draw[a][b]
                    enters[b // sockets] += draw[a][b]
                elif a != b:
                    pairs.append(draw[a][b])
        expected = max(max(pairs) / fast, max(leaves + enters) / slow) + 0.25
        assert seconds.item() == pytest.approx(expected)


def test_more_costs_more():
    """More ranks shorten the experts' time, faster links the exchange; more tokens cost more."""
    setups = [setup for setup in machines.SETUPS if setup.socket == machines.EPYC]
    slow, fast = (predict.links(replace(setups[3], between_hosts=machines.LINKS[name]))
                  for name in ("100 Gb Ethernet", "400 Gb InfiniBand"))  # fmt: skip
    found = {}
    for tokens, size in itertools.product((1, 16, 512), (1, 2, 4, 8)):
        counted = routing.counts(routing.draw(SMALL, tokens, 50), 8, size)
        for predicted in (model.all_reduce, model.all_to_all):
            quick, long = (
                predicted(engine(), network, SMALL, "training", tokens, counted) for network in (fast, slow)
            )
            assert quick.exchange < long.exchange if size > 1 else quick.exchange == long.exchange == 0
            found[predicted, tokens, size] = quick
    for predicted, size in itertools.product((model.all_reduce, model.all_to_all), (1, 2, 4, 8)):
        times = [found[predicted, tokens, size].seconds for tokens in (1, 16, 512)]
        assert times == sorted(times)
    for tokens in (1, 16, 512):
        times = [found[model.all_reduce, tokens, size].experts for size in (8, 4, 2, 1)]
        assert times == sorted(times)


@pytest.mark.parametrize(
    "setup", [s for s in machines.SETUPS if s.hosts == 1 and s.sockets > 1], ids=lambda s: s.name
)
def test_placements(setup):
    """Local memory is at least as fast as interleaved, and that as one memory for all."""
    socket = engine(bandwidth=dict.fromkeys(parts.MODES, setup.socket.bandwidth))
    local, interleaved, single = (predict.placed(socket, setup, how) for how in reversed(predict.PLACEMENTS))
    for mode in parts.MODES:
        own = setup.socket.bandwidth
        assert setup.sockets * own >= local.bandwidth[mode] >= interleaved.bandwidth[mode]
        assert interleaved.bandwidth[mode] >= single.bandwidth[mode]
        assert single.bandwidth[mode] <= own
    assert local.bandwidth["forward"] == setup.sockets * own
    assert local.peak == setup.sockets * socket.peak


def test_busier_with_skew():
    shape = predict.MODELS["Qwen3-30B-A3B"]
    loads = [predict.imbalance(shape, 512, 4, skew) for skew in predict.SKEWS]
    assert 1 < loads[0] < loads[1] < loads[2] < 4
