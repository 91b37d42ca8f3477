"""Predicts one layer of real models on servers: the table of docs/scale.md."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import results
from bench.scale import machines, model, routing
from bench.scale.machines import LINK_FRACTION, READ_FRACTION, SETUPS, Setup
from bench.scale.measured import Measured, milliseconds
from bench.scale.model import Curve, Engine, Gloo, Links, expert_work
from bench.scale.parts import MODES
from bench.shapes import SHAPES, Shape

MODELS = {
    "Qwen3-30B-A3B": SHAPES["qwen3_30b"],
    "DeepSeek-V2-Lite": SHAPES["dsv2_lite"],
    "DeepSeek-V3": Shape("dsv3", 7168, 2048, 256, 8),
}
LOADS = (("forward", 1), ("forward", 16), ("forward", 2048), ("training", 2048), ("training", 8192))
"""(mode, tokens) of the columns: decoding, a batch of 16, prefill, training."""

SKEWS = (0.0, 0.5, 1.0)
PLACEMENTS = ("one node", "interleaved", "local")


@dataclass(frozen=True)
class Kernels:
    """What is known about kernels from measurements, relative to the machine they were measured on.

    peak: FLOP/s of one core. fractions: of the bandwidth of plain reads at which weights are read, per mode.
    """

    peak: float
    rows_at_peak: dict[str, Curve]
    fractions: dict[str, float]
    overlap: dict[str, float]


def measured_kernels(measured: Measured) -> Kernels:
    """Returns the kernels of the machine whose parts were measured, from one core."""
    return Kernels(
        measured.peak(1),
        {mode: measured.rows_at_peak(mode, 1) for mode in MODES},
        {mode: min(1.0, measured.fraction_of_bandwidth(mode)) for mode in MODES},
        {mode: measured.overlap(mode, 1) for mode in MODES},
    )


def saved_kernels(record: dict) -> Kernels:
    """Returns the kernels of a saved run of bench.scaling, whose weights all came from memory.

    An expert takes no less time than with the fewest rows whose products take longer than its weights, and
    the time with more rows includes what the weights add.
    """
    shape, isa, threads = SHAPES["qwen3_30b"], record["isa"], record["machine"]["threads"]
    peak = record["machine"]["peak_flop_per_second"][f"{isa} bfloat16"][str(threads)]
    curves, fractions = {}, {}
    for mode in MODES:
        swept = [r for r in record["rows"] if r["sweep"] == "tokens" and r["mode"] == mode]
        flops, per_expert = expert_work(shape, mode)[0], shape.top_k / shape.num_experts
        curves[mode] = Curve({
            row["value"] * per_expert: row["seconds"] / shape.num_experts * peak / flops
            for row in swept if row["value"] * per_expert >= 16
        })  # fmt: skip
        fractions[mode] = min(1.0, next(row["fraction"] for row in swept if row["value"] == 16))
    return Kernels(peak / threads, curves, fractions, dict.fromkeys(MODES, 8.0))


def kernels_of(measured: Measured) -> dict[str, Kernels]:
    """Returns {isa: kernels}: those measured here, and those with AMX, saved on a machine that has it."""
    amx, *_ = results.load("scaling", isa="amx_bf16")
    return {"amx_bf16": saved_kernels(amx), measured.isa: measured_kernels(measured)}


def socket_engine(measured: Measured, kernels: Kernels, setup: Setup) -> Engine:
    """Returns a rank that has one socket of a setup."""
    socket = setup.socket
    core = kernels.peak
    if socket.gigahertz is not None:
        core = socket.gigahertz * 1e9 * machines.FLOPS_PER_CYCLE[socket.isa]
    read = socket.bandwidth * READ_FRACTION
    faster = read / measured.machine["read_bytes_per_second"]["1"]
    one = measured.engine(1)
    return replace(
        one,
        peak=core * socket.cores * machines.THREAD_FRACTION,
        rows_at_peak=kernels.rows_at_peak,
        bandwidth={mode: read * kernels.fractions[mode] for mode in MODES},
        call={mode: one.call[mode] + machines.REGION_SECONDS[mode] for mode in MODES},
        fill=one.fill / faster,
        overlap=kernels.overlap,
        around_scale=faster,
    )


def placed(engine: Engine, setup: Setup, placement: str) -> Engine:
    """Returns one process on all sockets of a host, with the weights in one of PLACEMENTS.

    one node: all sockets read from one memory; the others do over their links to it. interleaved: each reads
    1/S of its weights from its own memory, and as much over each link. local: forward reads only its own
    memory; backward reads the same weights along their other dimension, so as if they were interleaved.
    """
    sockets, link = setup.sockets, setup.between_sockets.bandwidth * LINK_FRACTION

    def bandwidth(mode: str) -> float:
        own = engine.bandwidth[mode]
        interleaved = min(sockets * own, sockets**2 * link)
        if placement == "one node":
            return min(own, sockets * link)
        if placement == "interleaved":
            return interleaved
        return sockets * own if mode == "forward" else 2 / (1 / (sockets * own) + 1 / interleaved)

    return replace(engine, peak=engine.peak * sockets, bandwidth={mode: bandwidth(mode) for mode in MODES})


def shared_activations(setup: Setup, shape: Shape, mode: str, tokens: int) -> float:
    """Returns the seconds in which sockets read each other's activations.

    Each other socket reads hidden_states from the one that has them, and each its part of the intermediate
    rows from each other. Backward does the same with gradients.
    """
    if setup.sockets == 1:
        return 0.0
    rows = tokens * (shape.hidden_size + shape.top_k * shape.intermediate_size / setup.sockets)
    passes = 2 if mode == "training" else 1
    return passes * model.ITEMSIZE * rows / (setup.between_sockets.bandwidth * LINK_FRACTION)


class Slower:
    """Exchanges that take as long as the slower of two networks, software and links."""

    def __init__(self, *networks) -> None:
        self.networks = networks

    def all_reduce(self, size: float, ranks: int) -> float:
        return max(network.all_reduce(size, ranks) for network in self.networks)

    def all_to_all(self, sent: Tensor) -> Tensor:
        return torch.stack([network.all_to_all(sent) for network in self.networks]).amax(0)


def links(setup: Setup) -> Links:
    """Returns the links of a setup."""
    latency = (setup.between_hosts if setup.hosts > 1 else setup.between_sockets).latency
    return Links(
        setup.between_sockets.bandwidth * LINK_FRACTION,
        setup.between_hosts.bandwidth * LINK_FRACTION,
        latency,
        setup.sockets,
    )


def ids_of(shape: Shape, tokens: int, skew: float) -> Tensor:
    """Returns routings, more for fewer tokens, whose loads vary more."""
    return routing.draw(shape, tokens, max(4, min(256, 4096 // tokens)), skew)


def cells(setup: Setup, engine: Engine, gloo: Gloo, shape: Shape, mode: str, ids: Tensor) -> dict[str, str]:
    """Returns {how: milliseconds}; for expert parallelism by gloo, and at the speed of the links."""
    tokens, made = ids.shape[1], {}

    def words(*seconds: float) -> str:
        return " / ".join(map(milliseconds, seconds))

    counted = routing.counts(ids, shape.num_experts, setup.ranks)
    if setup.ranks == 1:
        return {"1 process": words(model.one_process(engine, shape, mode, counted).seconds)}
    if setup.hosts == 1:
        for placement in PLACEMENTS:
            predicted = model.one_process(placed(engine, setup, placement), shape, mode, counted)
            seconds = predicted.seconds + shared_activations(setup, shape, mode, tokens)
            made[f"1 process, {placement}"] = words(seconds)
    networks = Slower(gloo, links(setup)), links(setup)
    for name, predict in (("all_reduce", model.all_reduce), ("all_to_all", model.all_to_all)):
        found = [predict(engine, network, shape, mode, tokens, counted) for network in networks]
        made[f"{setup.ranks} ranks, {name}"] = words(*(prediction.seconds for prediction in found))
    return made


def table(
    measured: Measured, skew: float = 0.0, names: tuple[str, ...] = tuple(MODELS)
) -> list[tuple[str, ...]]:
    """Returns the lines: model, setup, how, and milliseconds of each load."""
    kernels, gloo = kernels_of(measured), measured.gloo()
    lines = []
    for name in names:
        shape = MODELS[name]
        drawn = {tokens: ids_of(shape, tokens, skew) for tokens in {tokens for _, tokens in LOADS}}
        for setup in SETUPS:
            engine = socket_engine(measured, kernels[setup.socket.isa], setup)
            found: dict[str, list[str]] = {}
            for mode, tokens in LOADS:
                for how, cell in cells(setup, engine, gloo, shape, mode, drawn[tokens]).items():
                    found.setdefault(how, []).append(cell)
            lines += [(name, setup.name, how, *row) for how, row in found.items()]
    return lines


COLUMNS = ("model", "machine", "how", *(f"{mode} T={tokens}" for mode, tokens in LOADS))


def imbalance(shape: Shape, tokens: int, ranks: int, skew: float) -> float:
    """Returns the expected load of the busiest rank divided by the mean load."""
    counted = routing.counts(ids_of(shape, tokens, skew), shape.num_experts, 1)
    loads = counted.sum(1).unflatten(1, (ranks, -1)).sum(2).double()
    return (loads.amax(1) / loads.mean(1)).mean().item()
