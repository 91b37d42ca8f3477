"""Times every configuration in turn, round after round, and calibrates the machine around each sample."""

import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from types import ModuleType

import ktops
from bench.layer import Inputs, Layer, Variant
from bench.machine import Calibration, OtherLoad
from bench.roofline import Limits, Work
from bench.shapes import Shape
from bench.verify import WrongResult

# A call was undisturbed if caches were read at this fraction of the best rate or more, before and after it.
# Reads scatter by a tenth if the other hyper-thread is idle; they lose a third or more if it is busy.
_UNDISTURBED = 0.75
_PAUSE_SECONDS = 0.02  # lets the thread pool of the previous contestant fall asleep


@dataclass(frozen=True)
class Plan:
    """How long to measure: rounds with one kept sample each, seconds per sample, and when to drop a sample.

    A configuration whose first call takes longer than slow_seconds has a single round.
    """

    rounds: int
    sample_seconds: float
    max_load: float
    max_attempts: int
    slow_seconds: float = math.inf


@dataclass
class Configuration:
    """One row of the report with the calls measured so far."""

    op: ModuleType
    isa: str
    layer: Layer
    tokens: int
    variant: Variant
    seconds: list[float] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)
    limit_seconds: list[float] = field(default_factory=list)
    flop_rates: list[float] = field(default_factory=list)
    bounds: list[str] = field(default_factory=list)
    cache_reads: list[float] = field(default_factory=list)
    fastest_cache_read: float = 0.0
    samples: int = 0
    dropped: int = 0
    slow: bool = False
    error: float | None = None
    wrong: str | None = None

    @property
    def shape(self) -> Shape:
        return self.layer.shape

    @property
    def name(self) -> str:
        return f"{self.shape.name} T={self.tokens} {self.op.MODE} r={self.variant.rank} {self.isa}"

    def inputs(self) -> Inputs:
        """Returns inputs that no call has used before."""
        return self.layer.inputs(self.tokens, self.variant.routing, self.variant.experts)

    @property
    def dtype(self) -> str:
        return str(self.layer.dtype).removeprefix("torch.")

    def record(self) -> dict:
        """Returns the row as plain values. A wrong or never quiet configuration has no figures."""
        row = {
            "op": self.op.__name__.rsplit(".", 1)[-1],
            "mode": self.op.MODE,
            "shape": self.shape.name,
            "tokens": self.tokens,
            "lora_rank": self.variant.rank,
            "save": self.variant.save,
            "full": self.variant.full,
            "routing": self.variant.routing,
            "layout": self.variant.layout,
            "isa": self.isa,
            "dtype": self.dtype,
            "status": "wrong" if self.wrong else "ok" if self.seconds else "busy",
            "samples": self.samples,
            "dropped_samples": self.dropped,
        }
        if self.wrong:
            row["message"] = self.wrong
        elif self.seconds:
            undisturbed = self.undisturbed()
            row |= {
                "seconds": statistics.median(self.seconds),
                "seconds_min": min(self.seconds),
                "seconds_max": max(self.seconds),
                "limit_seconds": statistics.median(self.limit_seconds),
                "bound": statistics.mode(self.bounds),
                "fraction": statistics.median(self.fractions),
                "flop_per_second": statistics.median(self.flop_rates),
                "undisturbed_calls": len(undisturbed),
                "undisturbed_fraction": statistics.median(undisturbed) if undisturbed else None,
                "relative_error": self.error,
            }
        return row

    def undisturbed(self) -> list[float]:
        """Returns the fractions of calls during which nothing else used the cores, not even another VM."""
        least = _UNDISTURBED * self.fastest_cache_read
        return [f for f, rate in zip(self.fractions, self.cache_reads, strict=True) if rate >= least]


def _time_calls(config: Configuration, seconds: float) -> tuple[list[tuple[float, Work]], Inputs, object]:
    """Returns ([(seconds, work) of each call], inputs and result of the last)."""
    calls: list[tuple[float, Work]] = []
    total = 0.0
    while not calls or total < seconds:
        inputs = config.inputs()
        start = time.perf_counter()
        result = config.op.call(config.layer, config.variant, inputs)
        elapsed = time.perf_counter() - start
        total += elapsed
        work = config.op.work(
            config.shape, config.tokens, inputs.distinct_experts, config.variant, config.layer.dtype.itemsize
        )
        calls.append((elapsed, work))
    return calls, inputs, result


def _warm_up(config: Configuration) -> float:
    """Returns the seconds of a first call."""
    inputs = config.inputs()
    start = time.perf_counter()
    config.op.call(config.layer, config.variant, inputs)
    return time.perf_counter() - start


def mean_limits(a: Limits, b: Limits) -> Limits:
    """Returns the mean of two measurements."""
    return Limits((a.peak + b.peak) / 2, (a.bandwidth + b.bandwidth) / 2)


def _sample(config: Configuration, calibration: Calibration, plan: Plan) -> None:
    """Calibrates, times calls for a while, calibrates again; keeps the sample if the machine was quiet."""
    with OtherLoad() as load:
        before = calibration.limits(config.isa, config.dtype)
        time.sleep(_PAUSE_SECONDS)
        cache_read = calibration.cache_read()
        calls, inputs, result = _time_calls(config, plan.sample_seconds)
        cache_read = min(cache_read, calibration.cache_read())
        time.sleep(_PAUSE_SECONDS)
        limits = mean_limits(before, calibration.limits(config.isa, config.dtype))
    if config.error is None:
        config.error = config.op.check(config.layer, config.variant, inputs, result)
    if load.cores > plan.max_load:
        config.dropped += 1
        return
    config.samples += 1
    for elapsed, work in calls:
        limit = work.seconds(limits)
        config.seconds.append(elapsed)
        config.limit_seconds.append(limit)
        config.fractions.append(limit / elapsed)
        config.flop_rates.append(work.flops / elapsed)
        config.bounds.append(work.bound(limits))
        config.cache_reads.append(cache_read)


def measure(configurations: list[Configuration], calibration: Calibration, plan: Plan) -> None:
    """Fills the configurations: a warm-up call each, then rounds in which every configuration has a turn.

    A dropped sample is retried in later rounds, up to plan.max_attempts times in total. The first timed
    result is checked; a configuration with a wrong result is not timed again.
    """
    for attempt in range(plan.max_attempts):
        pending = [c for c in configurations if c.samples < (1 if c.slow else plan.rounds) and not c.wrong]
        if not pending:
            break
        for number, config in enumerate(pending, 1):
            progress = f"round {attempt + 1}, {number} of {len(pending)}: {config.name}"
            print(progress, file=sys.stderr, flush=True)
            with ktops.use_isa(config.isa):
                try:
                    if attempt == 0:
                        config.slow = _warm_up(config) > plan.slow_seconds
                    _sample(config, calibration, plan)
                except WrongResult as wrong:
                    config.wrong = str(wrong)
                    print(f"WRONG {config.name}: {wrong}", file=sys.stderr, flush=True)
    for config in configurations:
        config.fastest_cache_read = calibration.fastest_cache_read
