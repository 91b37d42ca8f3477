"""What a conversion reads, writes and needs in memory, known before anything is written."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ktops._display import format_bytes
from ktops.checkpoints import Checkpoint, Layer
from ktops.checkpoints.experts import CHUNK_WEIGHTS, Experts, Requantized
from ktops.checkpoints.layer import PROJECTIONS
from ktops.checkpoints.new_file import NewLayer
from ktops.checkpoints.view import View
from ktops.cli.errors import UserError
from ktops.cli.plan.machine import anonymous_bytes, read_memory
from ktops.cli.weight_format import ADVICE, experts_in_format

RUNNING = 24 << 20
"""What the libraries allocate beside the experts.

Fitted to the measured peaks of a few runs with small experts; ``python -m bench.plan convert`` repeats them.
"""

Say = Callable[[str], object]
"""Takes a line for the user."""


@dataclass(frozen=True)
class Part:
    """A layer, the name to write it under, and its gate_up_proj and down_proj in the new format."""

    name: str
    layer: Layer
    experts: tuple[Experts, Experts]

    @property
    def nbytes(self) -> int:
        """Size of the tensors that are written."""
        rows = sum(getattr(self.layer, name).shape[1] for name in PROJECTIONS if self.layer.has_bias(name))
        return sum(experts.nbytes for experts in self.experts) + 4 * self.layer.num_experts * rows

    @property
    def nbytes_per_thread(self) -> int:
        """The most that a thread holds of it: a matrix of an expert as it was, and twice as it becomes.

        Once for the result, and once for the parts that it is made of, whose memory malloc keeps.
        """
        sizes = []
        for experts in self.experts:
            sizes.append((_source(experts).nbytes + 2 * experts.nbytes) // len(experts))
        return max(sizes) + 2 * 4 * CHUNK_WEIGHTS

    def to_write(self) -> NewLayer:
        """Returns what CheckpointWriter writes, with the biases, which are read now."""
        gate_up_bias, down_bias = (self.layer.bias(name, torch.float32) for name in PROJECTIONS)
        return NewLayer(self.name, *self.experts, gate_up_bias, down_bias)


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion.

    Attributes:
        parts: all layers with experts.
        others: the tensors that are copied, by name.
    """

    parts: Sequence[Part]
    others: Mapping[str, View]

    @property
    def read(self) -> int:
        """Bytes of the tensors that are read."""
        experts = (view for part in self.parts for view in part.layer.tensors)
        return sum(view.nbytes for view in (*experts, *self.others.values()))

    @property
    def written(self) -> int:
        """Bytes of the tensors that are written; headers and small files come on top of them."""
        return sum(part.nbytes for part in self.parts) + self._copied

    @property
    def _copied(self) -> int:
        return sum(view.nbytes for view in self.others.values())

    def memory(self, num_threads: int) -> int:
        """Returns the bytes of memory that so many threads, and one that compares the results, allocate."""
        threads = num_threads + (num_threads > 1)
        return threads * max(part.nbytes_per_thread for part in self.parts) + RUNNING

    def describe(self, destination: Path, num_threads: int) -> str:
        """Returns the first line of `ktops convert`."""
        experts = [each for part in self.parts for each in part.experts]
        before, after = _formats(map(_source, experts)), _formats(experts)
        memory = anonymous_bytes() + self.memory(num_threads)
        return (
            f"plan: {format_bytes(self.read)} read (experts in {before}), {format_bytes(self.written)} "
            f"written (experts in {after}), {format_bytes(_free(destination))} free on the disk; memory "
            f"{format_bytes(memory)}; {read_memory()}"
        )


def plan_conversion(
    checkpoint: Checkpoint,
    weight_format: str,
    group_size: int | None,
    method: str | None,
    advice: str = ADVICE,
) -> ConversionPlan:
    """Returns what `ktops convert` makes of a checkpoint; see :func:`experts_in_format`."""
    layers = experts_in_format(checkpoint, weight_format, group_size, method, advice)
    parts = [Part(layer.written_name, layer, both) for layer, both in layers]
    return ConversionPlan(parts, {} if _is_gguf(checkpoint) else checkpoint.other_tensors())


def _is_gguf(checkpoint: Checkpoint) -> bool:
    """True for GGUF files, whose other tensors have ggml's names and blocks, which only ktops reads here."""
    return any(view.file.path.suffix == ".gguf" for view in checkpoint.tensors.values())


def _source(experts: Experts) -> Experts:
    return experts.source if isinstance(experts, Requantized) else experts


def _formats(experts: Iterable[Experts]) -> str:
    return " and ".join(dict.fromkeys(each.format for each in experts))


def require_memory(plan: ConversionPlan, num_threads: int, force: bool, say: Say) -> None:
    """Raises UserError if the threads need more memory than there is; only says so with ``force``."""
    needed, memory = plan.memory(num_threads), read_memory()
    if needed > memory.available:
        fewer = " Fewer threads need less (--num-threads)." if num_threads > 1 else ""
        _refuse(f"{format_bytes(needed)} more memory are needed; {memory}.{fewer}", force, say)


def require_space(destination: Path, needed: int, force: bool, say: Say) -> None:
    """Raises UserError if the disk has no room for so many bytes; only says so with ``force``."""
    free = _free(destination)
    if needed > free:
        _refuse(
            f"{destination}: {format_bytes(needed)} will be written, but only {format_bytes(free)} are free "
            "on its disk.",
            force,
            say,
        )


def _refuse(problem: str, force: bool, say: Say) -> None:
    if not force:
        raise UserError(f"{problem} --force tries anyway")
    say(f"--force: {problem}")


def _free(destination: Path) -> int:
    """Returns the free bytes on the disk of a directory that need not exist."""
    existing = next(folder for folder in destination.absolute().parents if folder.is_dir())
    return shutil.disk_usage(existing).free
