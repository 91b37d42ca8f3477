"""Measures contestants in worker processes, taking turns round after round (A B A B) on the same inputs."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from bench.layer import Inputs, Layer
from bench.machine import OtherLoad
from bench.verify import WrongResult

ROOT = Path(__file__).parent.parent
_PAUSE_SECONDS = 0.05  # a spinning thread pool that has just finished would take a core from the next one
_LONG_SECONDS = 3.0


class ContestError(Exception):
    """Raised if a worker could not fulfill a request."""


class Worker:
    """A process of ``python -m bench.worker`` or alike; send it requests with :meth:`ask`.

    Args:
        python: the interpreter of its environment.
        environment: additional environment variables.
        ktops: the folder from which it imports ktops; default: what its interpreter finds.
        log: the file for its output.
        module: what it runs, which calls :func:`bench.serving.serve`.
    """

    def __init__(
        self,
        python: str,
        environment: dict[str, str],
        log: Path,
        ktops: Path | None = None,
        module: str = "bench.worker",
    ) -> None:
        command = [python, "-m", module, *(["--ktops", str(ktops)] if ktops else [])]
        self._log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                env={**os.environ, **environment},
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self._requests, self._replies = self.process.stdin, self.process.stdout

    def ask(self, do: str, **arguments) -> dict:
        """Sends a request and returns the reply.

        Raises:
            ContestError: the request failed, or the process ended.
        """
        try:
            self._requests.write(json.dumps({"do": do, **arguments}) + "\n")
            self._requests.flush()
            line = self._replies.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = (self._log.read_text().strip() or "no output").splitlines()[-1]
            raise ContestError(f"the process ended with status {self.process.wait()}: {last}")
        reply = json.loads(line)
        if "error" in reply:
            raise ContestError(reply["error"])
        return reply

    def close(self) -> None:
        """Ends the process and waits for it."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        self._replies.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Entrant:
    """A contestant in one case and its samples so far: {round: seconds of its calls}."""

    name: str
    worker: Worker
    samples: dict[int, list[float]] = field(default_factory=dict)
    dropped: int = 0
    error: float | None = None
    failure: str | None = None
    wrong: bool = False
    slow: bool = False

    @property
    def seconds(self) -> float | None:
        """Median over all calls; None if there is no sample or the result was wrong."""
        calls = [s for sample in self.samples.values() for s in sample]
        return statistics.median(calls) if calls and not self.failure else None

    @property
    def status(self) -> str:
        """ "ok", "wrong", "failed", or "busy" if no sample was quiet."""
        if self.failure:
            return "wrong" if self.wrong else "failed"
        return "ok" if self.samples else "busy"

    def spread(self) -> tuple[float, float]:
        """The smallest and the largest median of a round."""
        medians = [statistics.median(sample) for sample in self.samples.values()]
        return min(medians), max(medians)


@dataclass(frozen=True)
class Turns:
    """How long to measure: rounds, seconds per sample, when to drop one, and what is too slow to repeat."""

    rounds: int
    seconds: float
    max_load: float
    max_attempts: int
    slow_factor: float = 10.0


def inputs_around(layer: Layer, tokens: int) -> list[Inputs]:
    """Returns inputs that together use every expert, so that weights are cold when they are used again."""
    calls = max(1, -(-layer.shape.num_experts // (tokens * layer.shape.top_k)))
    return [layer.inputs(tokens) for _ in range(min(max(calls, 2), 32))]


def _turn(entrant: Entrant, mode: str, turns: Turns, number: int) -> int:
    """Takes one sample; returns the index of the input of the last call."""
    time.sleep(_PAUSE_SECONDS)
    with OtherLoad() as load:
        reply = entrant.worker.ask(
            "run", contestant=entrant.name, mode=mode, seconds=turns.seconds, max_calls=1000
        )
        load.leave_out(reply["cpu_seconds"])
    if load.cores > turns.max_load:
        entrant.dropped += 1
    else:
        entrant.samples[number] = reply["seconds"]
    return reply["last"]


def _warm_up(entrant: Entrant, mode: str, calls: list[Inputs], check, scratch: Path) -> float:
    """Checks a first call; returns the seconds of a second one, unless the first already took long."""
    reply = entrant.worker.ask("run", contestant=entrant.name, mode=mode, seconds=0.0, max_calls=1)
    file = scratch / "result.pt"
    entrant.worker.ask("result", file=str(file))
    entrant.error = check(entrant, calls[reply["last"]], torch.load(file, weights_only=True))
    file.unlink()
    if reply["seconds"][0] < _LONG_SECONDS:
        reply = entrant.worker.ask("run", contestant=entrant.name, mode=mode, seconds=0.0, max_calls=1)
    return reply["seconds"][0]


def contest(
    entrants: list[Entrant], mode: str, calls: list[Inputs], check, turns: Turns, scratch: Path
) -> None:
    """Fills the entrants' samples: a checked call each, then rounds in which every entrant has a turn.

    The order is reversed in every other round. If an entrant raises an error, or ``check(entrant, inputs,
    result)`` rejects its result by raising WrongResult, its failure is recorded and it does not take part. An
    entrant that is slow_factor times slower than the fastest has a single round.
    """
    file = scratch / "inputs.pt"
    torch.save([asdict(inputs) for inputs in calls], file)
    for worker in dict.fromkeys(entrant.worker for entrant in entrants):
        try:
            worker.ask("inputs", file=str(file))
        except ContestError as error:
            for entrant in (e for e in entrants if e.worker is worker):
                entrant.failure = str(error)
    first = {}
    for entrant in (e for e in entrants if not e.failure):
        try:
            first[entrant.name] = _warm_up(entrant, mode, calls, check, scratch)
        except ContestError as error:
            entrant.failure = str(error)
        except WrongResult as error:
            entrant.failure, entrant.wrong = str(error), True
    for entrant in entrants:
        if entrant.name in first:
            entrant.slow = first[entrant.name] > turns.slow_factor * min(first.values())
    for attempt in range(turns.max_attempts):
        for entrant in entrants if attempt % 2 == 0 else entrants[::-1]:
            if not entrant.failure and len(entrant.samples) < (1 if entrant.slow else turns.rounds):
                try:
                    _turn(entrant, mode, turns, attempt)
                except ContestError as error:
                    entrant.failure = str(error)


def say(text: str) -> None:
    """Prints a line of progress to standard error."""
    print(text, file=sys.stderr, flush=True)
