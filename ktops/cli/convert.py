"""`ktops convert`: converts experts to a weight format and writes a directory that ktops can map."""

import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ktops._display import Step, format_bytes, progress
from ktops._workers import Workers
from ktops.checkpoints import Checkpoint, CheckpointError, CheckpointWriter, open_checkpoint
from ktops.checkpoints.checkpoint import MANIFEST
from ktops.checkpoints.config import converted_config
from ktops.checkpoints.view import View
from ktops.checkpoints.writer import small_files
from ktops.cli.conversion_plan import ConversionPlan, Part, plan_conversion, require_memory, require_space
from ktops.cli.conversion_report import REPORT, ConversionReport, show
from ktops.cli.errors import UserError, told


@dataclass(frozen=True)
class Options:
    """Arguments of the command; group_size defaults to the format's, method to rtn.

    report is one of EXTENTS; num_threads defaults to PyTorch's. With force, too little disk or memory is no
    error.
    """

    source: Path
    destination: Path
    weight_format: str
    group_size: int | None = None
    method: str | None = None
    overwrite: bool = False
    report: str = "sample"
    num_threads: int | None = None
    force: bool = False


def convert(options: Options, console: Console) -> dict:
    """Runs `ktops convert`, continuing an interrupted conversion with the same options.

    Returns:
        The contents of ktops-report.json.

    Raises:
        UserError: something is wrong with the source, the format cannot hold it, the destination exists, or
            disk or memory are not enough.
        Interrupted: Ctrl-C.
    """

    def say(line: str) -> None:
        console.print(f"  {line}", soft_wrap=True)

    _require_destination(options)
    again = "Run the same command again to continue."
    with (
        told(options.destination, (CheckpointError, ImportError), interrupted=again),
        Workers(options.num_threads) as workers,
    ):
        checkpoint = open_checkpoint(options.source)
        plan = _plan(checkpoint, options)
        say(plan.describe(options.destination, workers.num_threads))
        require_memory(plan, workers.num_threads, options.force, say)
        partial = CheckpointWriter.partial_path(options.destination)
        interrupted = partial.exists()
        if not interrupted:
            require_space(options.destination, plan.written, options.force, say)
        writer = CheckpointWriter(
            options.destination, _settings(options, checkpoint), overwrite=options.overwrite, workers=workers
        )
        done = sum(writer.has(part.name) for part in plan.parts)
        if done:
            say(f"continuing: {done} of {len(plan.parts)} layers are written and verified")
        elif interrupted and not writer.is_resumed:
            say(f"{partial} is damaged, or the options or the source changed: starting over")
        if not writer.is_complete:
            if interrupted:
                require_space(options.destination, plan.written - writer.nbytes, options.force, say)
            settings = _described(options, plan.parts)
            report = ConversionReport(writer.partial / REPORT, checkpoint, settings, options.report, workers)
            if report.problem is not None:
                say(f"{report.problem}. from_pretrained will refuse {options.destination}")
            _write(writer, checkpoint, plan, report)
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


def _plan(checkpoint: Checkpoint, options: Options) -> ConversionPlan:
    """Returns what is to be done, checked, so that writing starts only if all of it can be written."""
    checkpoint.require_layers()
    return plan_conversion(
        checkpoint,
        options.weight_format,
        options.group_size,
        options.method,
        advice="Convert the original model",
    )


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


def _described(options: Options, parts: Sequence[Part]) -> dict:
    """Returns what the report says about the conversion; group_size is None if it differs."""
    sizes = {experts.group_size for part in parts for experts in part.experts}
    return {
        "source": options.source.resolve().name,
        "format": options.weight_format,
        "group_size": sizes.pop() if len(sizes) == 1 else None,
        "method": options.method or "rtn",
    }


def _write(
    writer: CheckpointWriter, checkpoint: Checkpoint, plan: ConversionPlan, report: ConversionReport
) -> None:
    """Runs all steps of a conversion except the last."""
    left = [part for part in plan.parts if not writer.has(part.name)]
    total = 2 * sum(part.layer.num_experts for part in left) + len(plan.others)
    try:
        with progress("converting", total) as step:
            _write_experts(writer, plan.parts, report, step)
            writer.write_tensors(plan.others, step=step)
        _copy_files(writer, checkpoint, plan.others)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        lacking = format_bytes(plan.written - writer.nbytes)
        raise UserError(
            f"{error.filename or writer.partial}: {error.strerror}: {lacking} more are needed. "
            f"{writer.partial} keeps what is finished: run the same command again to continue"
        ) from None


def _write_experts(
    writer: CheckpointWriter, parts: Sequence[Part], report: ConversionReport, step: Step
) -> None:
    layers = {part.name: part.layer for part in parts}

    def measure(name: str) -> None:
        report.add(name, layers[name], writer.layer_file(name))

    for name in layers:
        if writer.has(name) and not report.has(name):
            measure(name)
    new = (part.to_write() for part in parts if not writer.has(part.name))
    writer.write_layers(new, step=step, written=measure)


def _copy_files(writer: CheckpointWriter, checkpoint: Checkpoint, others: Mapping[str, View]) -> None:
    """Copies the tokenizer and other small files, and writes a config.json for ktops' loader."""
    if not checkpoint.path.is_dir():
        return
    writer.copy(path for path in small_files(checkpoint.path) if path.name != REPORT)
    if checkpoint.config:
        writer.write_config(converted_config(checkpoint.config, others))
