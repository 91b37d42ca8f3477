"""Turns the rows of bench.scale.parts into an engine of one rank, and gloo between ranks."""

from dataclasses import dataclass

import torch

from bench.scale.model import Curve, Engine, Gloo, expert_work, together
from bench.scale.parts import COLLECTIVES, MODES
from bench.shapes import Shape

_OVERLAPS = tuple(1 + step / 4 for step in range(29))
_FEW_ROWS = 4
_LEAST = 0.1  # of a time, which is left after another one is subtracted, however noisy both are


def _less(whole: float, part: float) -> float:
    return max(whole - part, _LEAST * whole)


@dataclass(frozen=True)
class Measured:
    """The parts of a layer's time, measured on one machine.

    Args:
        shape: the measured layer.
        rows: of :func:`bench.scale.parts.measure`.
        machine: of :func:`bench.results.machine_record`.
        isa: the kernels.
    """

    shape: Shape
    rows: list[dict]
    machine: dict
    isa: str

    def seconds(self, kind: str, name: str, threads: int | None = None) -> dict[int, float]:
        """Returns {size: seconds} of a part; threads: None if it was measured with one number only."""
        found = [row for row in self.rows if (row["kind"], row["name"]) == (kind, name)]
        return {row["size"]: row["seconds"] for row in found if threads in (None, row["threads"])}

    @property
    def threads(self) -> int:
        """The threads of all ranks."""
        return max(row["threads"] for row in self.rows if row["kind"] == "hot")

    def peak(self, threads: int) -> float:
        """The FLOP/s of the kernels on some threads, in proportion to one thread's."""
        return threads * self.machine["peak_flop_per_second"][f"{self.isa} bfloat16"]["1"]

    def expert(self, mode: str, threads: int) -> float:
        """The seconds that the next expert with one row takes, its weights read from memory.

        A few rows take no longer than one, so the mean over such calls counts.
        """
        single = self.seconds("single", mode, threads)[1]
        few = [row for row in self.cold(mode, threads) if row["size"] <= _FEW_ROWS]
        return sum(_less(row["seconds"], single) / (row["experts"] - 1) for row in few) / len(few)

    def cold(self, mode: str, threads: int) -> list[dict]:
        chosen = "cold", mode, threads
        return [row for row in self.rows if (row["kind"], row["name"], row["threads"]) == chosen]

    def fixed(self, mode: str, threads: int) -> float:
        """The seconds of a call of the whole layer that its experts with rows do not account for."""
        call = self.seconds("call", mode, threads)[1]
        return max(call, self.seconds("single", mode, threads)[1] - self.expert(mode, threads))

    def memory(self, mode: str, threads: int, overlap: float) -> float:
        """The seconds to read an expert's weights, which give the measured time of one row."""
        whole, compute = self.expert(mode, threads), self.compute(mode, threads, torch.tensor(1)).item()
        return max(whole**overlap - compute**overlap, (_LEAST * whole) ** overlap) ** (1 / overlap)

    def bandwidth(self, mode: str, threads: int) -> float:
        """The bytes/s at which weights are read."""
        seconds = self.memory(mode, threads, self.overlap(mode, threads))
        return expert_work(self.shape, mode)[1] / seconds

    def compute(self, mode: str, threads: int, rows: torch.Tensor) -> torch.Tensor:
        """The seconds of an expert whose weights are in the caches."""
        flops = expert_work(self.shape, mode)[0]
        return self.rows_at_peak(mode, threads)(rows) * flops / self.peak(threads)

    def rows_at_peak(self, mode: str, threads: int) -> Curve:
        flops = expert_work(self.shape, mode)[0]
        call = self.seconds("call", mode, threads)[1]
        hot = self.seconds("hot", mode, threads)
        return Curve({size: _less(took, call) * self.peak(threads) / flops for size, took in hot.items()})

    def fraction_of_bandwidth(self, mode: str) -> float:
        """The bandwidth of one thread in a layer as a fraction of that of plain reads."""
        return self.bandwidth(mode, 1) / self.machine["read_bytes_per_second"]["1"]

    def overlap(self, mode: str, threads: int) -> float:
        """The p with which calls with weights from memory are predicted best from their parts."""
        cold, fixed = self.cold(mode, threads), self.fixed(mode, threads)
        rows = torch.tensor([row["size"] for row in cold])
        took = torch.tensor([(row["seconds"] - fixed) / row["experts"] for row in cold], dtype=torch.float64)
        compute = self.compute(mode, threads, rows)

        def error(overlap: float) -> float:
            predicted = together(compute, self.memory(mode, threads, overlap), overlap)
            return (predicted / took).log().square().sum().item()

        return min(_OVERLAPS, key=error)

    def engine(self, threads: int, sharers: int = 1) -> Engine:
        """Returns a process with some threads, while ``sharers`` such processes share the memory."""
        all_threads = threads * sharers
        call = {mode: self.seconds("call", mode, threads)[1] for mode in MODES}
        adapters = self.shape.num_experts * expert_work(self.shape, "training")[2]
        return Engine(
            peak=self.peak(threads),
            rows_at_peak={mode: self.rows_at_peak(mode, threads) for mode in MODES},
            bandwidth={mode: self.bandwidth(mode, all_threads) / sharers for mode in MODES},
            call=call,
            fill=(self.fixed("training", threads) - call["training"]) / adapters,
            overlap={mode: self.overlap(mode, all_threads) for mode in MODES},
            around=self.around(),
        )

    def around(self) -> dict[str, Curve]:
        elements = self.shape.top_k * self.shape.hidden_size
        curves = {}
        for name in (f"{collective} {mode}" for collective in COLLECTIVES for mode in MODES):
            measured = self.seconds("around", name)
            curves[name] = Curve({size * elements: took for size, took in measured.items()})
        return curves

    def gloo(self) -> Gloo:
        return Gloo({name: Curve(self.seconds("exchange", name)) for name in COLLECTIVES})

    def line(self, collective: str) -> tuple[float, float]:
        """Returns (seconds, bytes/s), a line through the smallest and the largest exchange.

        The bytes are those that leave a rank.
        """
        took = self.seconds("exchange", collective)
        smallest, largest = min(took), max(took)
        return took[smallest], (largest - smallest) / 2 / (took[largest] - took[smallest])


def milliseconds(seconds: float) -> str:
    """Returns milliseconds with three digits or more, without an exponent."""
    return f"{1e3 * seconds:.3g}" if seconds < 0.9995 else f"{1e3 * seconds:.0f}"


def gigabytes(rate: float) -> str:
    """Returns bytes/s in words."""
    return f"{rate / 1e9:.3g} GB/s"


_ROWS = (1, 8, 32, 128, 1024)


def kernels_table(measured: Measured) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns (columns, lines): the fraction of the peak by rows of an expert, and what a layer adds."""
    lines: list[tuple[str, ...]] = []
    for threads in sorted({1, measured.threads}):
        for mode in MODES:
            curve = measured.rows_at_peak(mode, threads)
            fractions = (f"{size / curve.at(size):.2f}" for size in _ROWS)
            memory = gigabytes(measured.bandwidth(mode, threads))
            fixed = f"{1e6 * measured.fixed(mode, threads):.0f} µs"
            lines.append(
                (str(threads), mode, *fractions, memory, fixed, f"{measured.overlap(mode, threads):g}")
            )
    rows = (f"{size} rows" for size in _ROWS)
    return ("threads", "mode", *rows, "weights from memory", "besides", "p"), lines


def summary(measured: Measured) -> list[str]:
    """Returns what else was measured, in lines of text."""
    machine, lines = measured.machine, []
    lines.append(f"Peak of a core: {measured.peak(1) / 1e9:.0f} GFLOP/s")
    reads = machine["read_bytes_per_second"].items()
    lines.append("Reads: " + ", ".join(f"{gigabytes(rate)} on {n} threads" for n, rate in reads))
    copies = [row for row in measured.rows if row["kind"] == "copy"]
    rates = [f"{gigabytes(row['size'] / row['seconds'])} on {row['threads']} threads" for row in copies]
    lines.append("Copies: " + ", ".join(rates))
    for collective in COLLECTIVES:
        latency, rate = measured.line(collective)
        ranks = max(row["threads"] for row in measured.rows if row["kind"] == "exchange")
        words = f"{1e6 * latency:.0f} µs and {gigabytes(rate)} of what leaves a rank"
        lines.append(f"{collective} by gloo between {ranks} processes: {words}")
    for collective in COLLECTIVES:
        took = [measured.seconds("around", f"{collective} {mode}")[2048] for mode in MODES]
        words = " and ".join(f"{milliseconds(t)} ms in {mode}" for t, mode in zip(took, MODES, strict=True))
        lines.append(f"Around {collective} with 2048 tokens per rank: {words}")
    return lines
