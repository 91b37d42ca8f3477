"""Checks of ktops on a device, and the report of their results."""

import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from gpu.runtime import Runtime

Row = dict[str, object]
"""A row of figures; rows with the same columns form a table."""


@dataclass(frozen=True)
class Check:
    """What must hold on a device.

    Attributes:
        name: what the report calls it.
        needs: the features of a Runtime without which it cannot run.
        run: raises an exception if it does not hold; yields figures.
    """

    name: str
    needs: frozenset[str]
    run: Callable[[Runtime], Iterator[Row]]


CHECKS: list[Check] = []


def check(name: str, *needs: str) -> Callable[[Callable], Callable]:
    """Adds a function of a Runtime, which may yield figures, to CHECKS."""

    def add(function: Callable) -> Callable:
        CHECKS.append(Check(name, frozenset(needs), lambda runtime: function(runtime) or iter(())))
        return function

    return add


@dataclass(frozen=True)
class Outcome:
    """The result of a check: "pass", "fail", or "not run" because the time was up."""

    name: str
    result: str
    seconds: float = 0.0
    error: str = ""
    figures: tuple[Row, ...] = ()

    def line(self) -> str:
        return f"{self.result.upper():8}{self.seconds:7.1f} s  {self.name}"


def run_checks(
    runtime: Runtime, checks: Iterable[Check], clock: Callable[[], float], deadline: float
) -> Iterator[Outcome]:
    """Runs checks; begins none after the deadline, a time of the clock."""
    for one in checks:
        begin = clock()
        if begin >= deadline:
            yield Outcome(one.name, "not run")
            continue
        figures: list[Row] = []
        try:
            figures.extend(one.run(runtime))
        except Exception:
            yield Outcome(one.name, "fail", clock() - begin, traceback.format_exc(), tuple(figures))
        else:
            yield Outcome(one.name, "pass", clock() - begin, "", tuple(figures))
        runtime.reset()


def tables(outcomes: Iterable[Outcome]) -> str:
    """Returns the figures as Markdown, one table for each set of columns."""
    lines: list[str] = []
    for outcome in outcomes:
        columns: tuple[str, ...] = ()
        for row in outcome.figures:
            if tuple(row) != columns:
                columns = tuple(row)
                lines += ["", _line(columns), _line("---" for _ in columns)]
            lines.append(_line(_text(value) for value in row.values()))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
