"""`ktops convert`: converts experts to a weight format and writes a directory that ktops can map."""

import errno
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ktops._display import Step, format_bytes, progress
from ktops._workers import Workers
from ktops.checkpoints import Checkpoint, CheckpointError, CheckpointWriter, Layer, open_checkpoint
from ktops.checkpoints.checkpoint import MANIFEST
from ktops.checkpoints.config import converted_config
from ktops.checkpoints.experts import Experts
from ktops.checkpoints.layer import PROJECTIONS
from ktops.checkpoints.new_file import NewLayer
from ktops.checkpoints.view import View
from ktops.checkpoints.writer import small_files
from ktops.cli.conversion_report import REPORT, ConversionReport, show
from ktops.cli.errors import UserError, told
from ktops.cli.weight_format import experts_in_format


@dataclass(frozen=True)
class Options:
    """Arguments of the command; group_size defaults to the format's, method to rtn.

    report is one of EXTENTS; num_threads defaults to PyTorch's.
    """

    source: Path
    destination: Path
    weight_format: str
    group_size: int | None = None
    method: str | None = None
    overwrite: bool = False
    report: str = "sample"
    num_threads: int | None = None


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

    def to_write(self) -> NewLayer:
        """Returns what CheckpointWriter writes, with the biases, which are read now."""
        gate_up_bias, down_bias = (self.layer.bias(name, torch.float32) for name in PROJECTIONS)
        return NewLayer(self.name, *self.experts, gate_up_bias, down_bias)


def convert(options: Options, console: Console) -> dict:
    """Runs `ktops convert`, continuing an interrupted conversion with the same options.

    Returns:
        The contents of ktops-report.json.

    Raises:
        UserError: something is wrong with the source, the format cannot hold it, or the destination exists.
        Interrupted: Ctrl-C.
    """
    _require_destination(options)
    again = "Run the same command again to continue."
    with (
        told(options.destination, (CheckpointError, ImportError), interrupted=again),
        Workers(options.num_threads) as workers,
    ):
        checkpoint = open_checkpoint(options.source)
        parts = _plan(checkpoint, options)
        partial = CheckpointWriter.partial_path(options.destination)
        interrupted = partial.exists()
        writer = CheckpointWriter(
            options.destination, _settings(options, checkpoint), overwrite=options.overwrite, workers=workers
        )
        done = sum(writer.has(part.name) for part in parts)
        if done:
            console.print(f"  continuing: {done} of {len(parts)} layers are written and verified")
        elif interrupted and not writer.is_resumed:
            console.print(f"  {partial} is damaged, or the options or the source changed: starting over")
        if not writer.is_complete:
            settings = _described(options, parts)
            report = ConversionReport(writer.partial / REPORT, checkpoint, settings, options.report, workers)
            if report.problem is not None:
                problem = f"{report.problem}. from_pretrained will refuse {options.destination}"
                console.print(f"  {problem}", soft_wrap=True)
            _write(writer, checkpoint, parts, report)
        contents = json.loads((writer.finish() / REPORT).read_text(encoding="utf-8"))
    show(contents, options.destination, console)
    return contents


def _require_destination(options: Options) -> None:
    source, destination = options.source.resolve(), options.destination.resolve()
    if destination == source or source in destination.parents or destination in source.parents:
        raise UserError(f"{options.destination}: SRC and DST must not be the same or contain each other")
    if not destination.exists():
        return
    if not options.overwrite:
        raise UserError(f"{options.destination} already exists. Add --overwrite to replace it")
    if not (destination / MANIFEST).is_file():
        raise UserError(
            f"--overwrite: {options.destination} has no {MANIFEST}; only directories converted by ktops are "
            "replaced"
        )


def _plan(checkpoint: Checkpoint, options: Options) -> list[Part]:
    """Returns all layers, checked, so that writing starts only if all of them can be written."""
    checkpoint.require_layers()
    layers = experts_in_format(
        checkpoint,
        options.weight_format,
        options.group_size,
        options.method,
        advice="Convert the original model",
    )
    return [Part(layer.written_name, layer, both) for layer, both in layers]


def _settings(options: Options, checkpoint: Checkpoint) -> dict:
    """Returns everything the result depends on; if it changes, a partial result is discarded."""
    files = {}
    for path in {view.file.path for view in checkpoint.tensors.values()}:
        status = path.stat()
        files[path.name] = [status.st_size, status.st_mtime_ns]
    return {
        "source": options.source.resolve().name,
        "source_files": dict(sorted(files.items())),
        "format": options.weight_format,
        "group_size": options.group_size,
        "method": options.method or "rtn",
    }


def _described(options: Options, parts: list[Part]) -> dict:
    """Returns what the report says about the conversion; group_size is None if it differs."""
    sizes = {experts.group_size for part in parts for experts in part.experts}
    return {
        "source": options.source.resolve().name,
        "format": options.weight_format,
        "group_size": sizes.pop() if len(sizes) == 1 else None,
        "method": options.method or "rtn",
    }


def result_nbytes(parts: Iterable[Part], others: Iterable[View]) -> int:
    """Returns how many bytes of tensors a conversion writes; headers and small files come on top of them."""
    return sum(part.nbytes for part in parts) + sum(view.nbytes for view in others)


def _require_space(writer: CheckpointWriter, needed: int) -> None:
    free = shutil.disk_usage(writer.partial).free
    if needed > free:
        raise UserError(
            f"{writer.path}: {format_bytes(needed)} will be written, but only {format_bytes(free)} are free "
            "on its disk"
        )


def _write(
    writer: CheckpointWriter, checkpoint: Checkpoint, parts: list[Part], report: ConversionReport
) -> None:
    """Runs all steps of a conversion except the last."""
    others = _other_tensors(checkpoint)
    needed = result_nbytes(parts, others.values())
    _require_space(writer, needed - writer.nbytes)
    left = [part for part in parts if not writer.has(part.name)]
    total = 2 * sum(part.layer.num_experts for part in left) + len(others)
    try:
        with progress("converting", total) as step:
            _write_experts(writer, parts, report, step)
            writer.write_tensors(others, step=step)
        _copy_files(writer, checkpoint, others)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        lacking = format_bytes(needed - writer.nbytes)
        raise UserError(
            f"{error.filename or writer.partial}: {error.strerror}: {lacking} more are needed. "
            f"{writer.partial} keeps what is finished: run the same command again to continue"
        ) from None


def _write_experts(writer: CheckpointWriter, parts: list[Part], report: ConversionReport, step: Step) -> None:
    layers = {part.name: part.layer for part in parts}

    def measure(name: str) -> None:
        report.add(name, layers[name], writer.layer_file(name))

    for name in layers:
        if writer.has(name) and not report.has(name):
            measure(name)
    new = (part.to_write() for part in parts if not writer.has(part.name))
    writer.write_layers(new, step=step, written=measure)


def _other_tensors(checkpoint: Checkpoint) -> dict[str, View]:
    return {} if _is_gguf(checkpoint) else checkpoint.other_tensors()


def _is_gguf(checkpoint: Checkpoint) -> bool:
    """True for GGUF files, whose other tensors have ggml's names and blocks, which only ktops reads here."""
    return any(view.file.path.suffix == ".gguf" for view in checkpoint.tensors.values())


def _copy_files(writer: CheckpointWriter, checkpoint: Checkpoint, others: dict) -> None:
    """Copies the tokenizer and other small files, and writes a config.json for ktops' loader."""
    if not checkpoint.path.is_dir():
        return
    writer.copy(path for path in small_files(checkpoint.path) if path.name != REPORT)
    if checkpoint.config:
        writer.write_config(converted_config(checkpoint.config, others))
