"""What commands need of the memory: weights, what a trace counts, and what a process needs anyway."""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ktops._display import format_bytes
from ktops.cli.errors import UserError
from ktops.cli.finetune.options import Options, flag
from ktops.cli.plan.generation import trace_generation
from ktops.cli.plan.machine import Memory, anonymous_bytes, read_memory
from ktops.cli.plan.trace import Traced
from ktops.cli.plan.training import trace_training
from ktops.cli.plan.weights import Weights, build, count

SMALLER = ("int8", "int4")
"""Formats that are proposed for the experts, the more exact first."""

KEPT = 0.45
"""What glibc's malloc keeps beside the most tensors that its heap has held, as a fraction of them.

Fitted to the measured peaks of a few small runs, with RUNNING; ``python -m bench.plan`` repeats them.
"""


RUNNING = 64 << 20
"""What the libraries allocate when they run: threads, primitives of oneDNN, leftovers of loading."""


@dataclass(frozen=True)
class Needs:
    """The memory that a command needs at its peak.

    Attributes:
        parts: bytes of anonymous memory by part. There is no other place for them.
        mapped: bytes of mapped files by part. The system can drop them and read them again.
        processes: how many processes on one machine need these parts together. They share mapped files.
    """

    parts: dict[str, int]
    mapped: dict[str, int]
    processes: int = 1

    def times(self, processes: int) -> "Needs":
        """Returns what so many processes on one machine need, each of which needs this."""
        return Needs({name: size * processes for name, size in self.parts.items()}, self.mapped, processes)

    @property
    def anonymous(self) -> int:
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        return self.anonymous + sum(self.mapped.values())

    def fits(self, memory: Memory) -> bool:
        return self.anonymous - self.parts[LIBRARIES] <= memory.available

    def missing_cache(self, memory: Memory) -> int:
        """Returns how many bytes of the mapped files cannot stay in memory."""
        return max(0, self.total - self.parts[LIBRARIES] - memory.available)


LIBRARIES = "Python and libraries"
FREED = "freed, kept by malloc"


NeedsOf = Callable[[Options], Needs]


@dataclass(frozen=True)
class Change:
    """Options with which a command would need less.

    Attributes:
        text: the options on the command line.
        options, needs: all options, and what they need.
    """

    text: str
    options: Options
    needs: Needs


class Planner:
    """Computes what a model needs with given options, and with others.

    Args:
        options: of a run of `ktops finetune`, complete.
        length: tokens of the longest sequence, if that is less than ``max_length``.
        context: tokens of a conversation.
        processes: of `ktops finetune` on this machine.

    Raises:
        UserError: the model is not known, or the options do not fit it.
    """

    def __init__(
        self,
        options: Options,
        length: int | None = None,
        context: int = 4096,
        processes: int = 1,
    ) -> None:
        self.options, self.length, self.context, self.processes = options, length, context, processes
        self.memory = read_memory()
        self._traced: dict[tuple, Traced] = {}
        self._weights: dict[tuple, Weights] = {}

    @property
    def weights(self) -> Weights:
        return self.weights_with(self.options)

    def finetune(self, options: Options) -> Needs:
        """Returns what `ktops finetune` needs with these options, which differ in what a Change may have."""
        return _needs(self.weights_with(options), self._training(options)).times(self.processes)

    def chat(self, options: Options) -> Needs:
        """Returns what `ktops chat` needs with these options."""
        return _needs(self.weights_with(options), self.generation)

    @cached_property
    def generation(self) -> Traced:
        return trace_generation(self._model(), self.context)

    @property
    def active_parameters(self) -> int:
        """The number of weights that a token passes through."""
        routed = self.generation.experts
        share = sum(top_k / number for number, top_k in routed) / len(routed) if routed else 1
        counts = self.weights.parameters
        return sum(counts.values()) - round(counts["experts"] * (1 - share))

    def cheapest_change(self, needs: NeedsOf) -> Change | None:
        """Returns the first change with which a command fits, single ones before several; None if none does.

        Args:
            needs: :meth:`finetune` or :meth:`chat`.
        """
        changes = [list(self._formats())]
        if needs == self.finetune:
            changes += [list(self._batches()), list(self._checkpointing())]
        for change in (change for kind in changes for change in kind):
            found = self._changed(change, needs)
            if found.needs.fits(self.memory):
                return found
        together: dict[str, Any] = {}
        for kind in changes:
            together |= kind[-1] if kind else {}
            if together:
                found = self._changed(together, needs)
                if found.needs.fits(self.memory):
                    return found
        return None

    def _formats(self) -> Iterator[dict[str, Any]]:
        now = self.weights
        for name in SMALLER:
            change: dict[str, Any] = {"weight_format": name, "group_size": None, "mmap": False}
            try:
                changed = self.weights_with(replace(self.options, **change))
            except UserError:  # the format cannot hold the experts, or they are quantized already
                continue
            if changed.experts < now.experts:
                yield change

    def _batches(self) -> Iterator[dict[str, Any]]:
        size = self.options.batch_size or 1
        while size > 1:
            size //= 2
            yield {"batch_size": size}

    def _checkpointing(self) -> Iterator[dict[str, Any]]:
        if not self.options.gradient_checkpointing:
            yield {"gradient_checkpointing": True}

    def _changed(self, change: dict, needs: NeedsOf) -> Change:
        options = replace(self.options, **change)
        texts = []
        for name, value in change.items():
            if value is True:
                texts.append(flag(name))
            elif value:
                texts.append(f"{flag(name)} {value}")
        return Change(" ".join(texts), options, needs(options))

    def _model(self):
        assert self.options.model is not None
        return build(self.options.model, self.options.torch_dtype)

    def weights_with(self, options: Options) -> Weights:
        """Returns the weights with these options of how they are loaded."""
        key = options.weight_format, options.group_size, options.mmap, options.linear_format
        if key not in self._weights:
            assert options.model is not None
            self._weights[key] = count(self._model(), options.model, options)
        return self._weights[key]

    def _training(self, options: Options) -> Traced:
        assert options.batch_size is not None
        length = min(options.max_length, self.length or options.max_length)
        key = options.batch_size, length, options.gradient_checkpointing
        if key not in self._traced:
            self._traced[key] = trace_training(self._model(), options, options.batch_size, length)
        return self._traced[key]


def _needs(weights: Weights, traced: Traced) -> Needs:
    freed = (1 + KEPT) * traced.most_in_heap - traced.in_heap
    if platform.libc_ver()[0] != "glibc":
        freed = 0
    experts = f"experts in {weights.experts_format}"
    parts = {
        experts: weights.experts - weights.experts_mapped,
        "other weights": weights.others - weights.others_mapped,
        **traced.parts,
        FREED: round(freed),
        LIBRARIES: anonymous_bytes() + RUNNING,
    }
    mapped = {experts: weights.experts_mapped, "other weights": weights.others_mapped}
    return Needs({k: n for k, n in parts.items() if n}, {k: n for k, n in mapped.items() if n})


def summary(needs: Needs) -> str:
    """Returns the parts of at least a tenth of the memory, the largest first."""
    large = sorted(needs.parts.items(), key=lambda part: -part[1])
    named = [(name, size) for name, size in large if size * 10 >= needs.anonymous]
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in named)
