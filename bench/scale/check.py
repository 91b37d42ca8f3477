"""Runs a layer in one process and with expert parallelism, and compares the times with predictions."""

import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from bench.scale import model, parts, routing
from bench.scale.measured import Measured, milliseconds
from bench.scale.parts import COLLECTIVES, MODES
from bench.scale.ranks import Experts, Ranks, clock, expert_parallel, pin, run
from bench.shapes import Shape
from bench.verify import WrongResult
from ktops.testing.budgets import forward_budget, gradient_budget, relative_error

LIMIT = 0.25
"""The largest relative difference between prediction and measurement that passes."""

ONE_THREAD, ONE_PROCESS = "1 process, 1 thread", "1 process"
CASES = (ONE_THREAD, ONE_PROCESS, *COLLECTIVES)
_INPUTS = 3  # routings per number of tokens, the same in every case


class Case:
    """One way to run the layer on this rank's experts, or those of all ranks."""

    def __init__(
        self, name: str, mode: str, ranks: Ranks, mine: Experts, all_experts: Experts | None
    ) -> None:
        self.name, self.mode, self.ranks = name, mode, ranks
        self.alone = name in (ONE_THREAD, ONE_PROCESS)
        self.cpus = ranks.host_cpus if name == ONE_PROCESS else ranks.cpus[:1] if self.alone else ranks.cpus
        self.experts = all_experts if self.alone else mine
        self.call: Callable[..., Tensor] | None = None
        if self.experts is not None:
            self.experts = parts.adapters_of(self.experts, mode)
            layer = self.experts
            self.call = layer.forward if self.alone else expert_parallel(name, layer, ranks)

    def tokens(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Returns this rank's part of the tokens, which is all of them unless they travel."""
        if self.name != "all_to_all":
            return inputs
        taken = inputs[0].tensor_split(self.ranks.size)
        start = sum(part.shape[0] for part in taken[: self.ranks.rank])
        return tuple(tensor[start : start + taken[self.ranks.rank].shape[0]] for tensor in inputs)

    def run(self, inputs: tuple[Tensor, ...]) -> tuple:
        """Calls the layer; ranks that have no part in it do nothing."""
        if self.call is None or self.experts is None:
            return ()
        return run(self.call, self.mode, self.tokens(inputs), list(self.experts.adapters.values()))

    def seconds(self, inputs: tuple[Tensor, ...]) -> float:
        pin(self.cpus)
        now = clock(1) if self.name == ONE_THREAD else time.perf_counter
        return self.ranks.slowest(lambda: self.run(inputs), now)


def verify(case: Case, inputs: tuple[Tensor, ...], expected: tuple) -> None:
    """Compares rank 0's results with those of one process.

    Raises:
        WrongResult: output, or the gradient of hidden_states or of topk_weights, differs by more than both
            may differ from the exact result.
    """
    actual = case.run(inputs)
    if case.ranks.rank or not actual:
        return
    names = ("output", "grad of hidden_states", "grad of topk_weights")
    for name, one, other in zip(names, actual, expected, strict=False):
        budget = forward_budget(torch.bfloat16) if name == "output" else gradient_budget(torch.bfloat16)
        error = relative_error(one, other[: one.shape[0]])
        if not error <= 2 * budget:
            raise WrongResult(
                f"{case.name}: {name} is wrong: relative error {error:.3g}, allowed {2 * budget:.3g}"
            )


Times = dict[tuple[str, int, str], list[float]]
"""{(mode, tokens, case): the fastest call with each input}."""


def measure(
    shape: Shape,
    numbers: list[int],
    ranks: Ranks,
    layers: tuple[Experts, Experts | None],
    took: Times,
    seconds: float,
) -> None:
    """Runs every case with each input in turn for some seconds, updates the times, verifies first results.

    Args:
        numbers: of tokens.
        layers: the experts of this rank, and of all ranks on rank 0.
    """
    for mode in MODES:
        for tokens in numbers:
            inputs = [parts.tokens(shape, ids, seed) for seed, ids in enumerate(drawn(shape, tokens))]
            cases = [Case(name, mode, ranks, *layers) for name in CASES]
            if (mode, tokens, cases[0].name) not in took:
                expected = cases[0].run(inputs[0])
                for case in cases[1:]:
                    pin(case.cpus)
                    verify(case, inputs[0], expected)
            for case in cases:
                best = took.setdefault((mode, tokens, case.name), [float("inf")] * len(inputs))
                spent = 0.0
                while spent < seconds or not spent:
                    for index, given in enumerate(inputs):
                        last = case.seconds(given)  # of the slowest rank, so all ranks go on or stop
                        best[index], spent = min(best[index], last), spent + last


def drawn(shape: Shape, tokens: int) -> Tensor:
    """Returns the experts of the tokens of every input, [inputs, T, K]."""
    return routing.draw(shape, tokens, _INPUTS, seed=1)


def predicted_cases(measured: Measured, mode: str, tokens: int, ranks: Ranks) -> dict[str, model.Prediction]:
    """Returns {case: prediction} from the measured parts, for the same routings."""
    shape, ids = measured.shape, drawn(measured.shape, tokens)
    counted = routing.counts(ids, shape.num_experts, ranks.size)
    engine, gloo = measured.engine(len(ranks.cpus), ranks.sharers), measured.gloo()
    return {
        ONE_THREAD: model.one_process(measured.engine(1), shape, mode, counted),
        ONE_PROCESS: model.one_process(measured.engine(measured.threads), shape, mode, counted),
        "all_reduce": model.all_reduce(engine, gloo, shape, mode, tokens, counted),
        "all_to_all": model.all_to_all(engine, gloo, shape, mode, tokens, counted),
    }


def compared(measured: Measured, took: Times, ranks: Ranks) -> list[dict]:
    """Returns a row per mode, number of tokens and case, with measured and predicted seconds."""
    rows = []
    for mode, tokens in dict.fromkeys(key[:2] for key in took):
        predicted = predicted_cases(measured, mode, tokens, ranks)
        for name in CASES:
            times = took[mode, tokens, name]
            rows.append({
                "kind": "check", "name": f"{mode} {name}", "mode": mode, "case": name, "threads": ranks.size,
                "size": tokens, "shape": measured.shape.name,
                "seconds": sum(times) / len(times), "predicted": predicted[name].seconds,
                **asdict(predicted[name]),
            })  # fmt: skip
    return rows


def within(row: dict) -> bool:
    """Whether a prediction differs from the measurement by no more than LIMIT of it."""
    return abs(row["predicted"] / row["seconds"] - 1) <= LIMIT


def table(rows: list[dict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns (columns, lines), a line per mode and case: measured / predicted milliseconds (their ratio)."""
    numbers = sorted({row["size"] for row in rows})
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        ratio = row["predicted"] / row["seconds"]
        cell = f"{milliseconds(row['seconds'])} / {milliseconds(row['predicted'])} ({ratio:.2f})"
        lines.setdefault((row["mode"], row["case"]), {})[row["size"]] = cell
    columns = ("mode", "case", *(f"T={number}" for number in numbers))
    return columns, [(*name, *(cells.get(n, "-") for n in numbers)) for name, cells in lines.items()]
