"""`ktops convert`: converts experts to a weight format and writes a directory that ktops can map."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

import ktops
from ktops._display import format_bytes, progress
from ktops.checkpoints import Checkpoint, CheckpointError, CheckpointWriter, Layer, open_checkpoint
from ktops.checkpoints.checkpoint import MANIFEST
from ktops.checkpoints.config import converted_config
from ktops.checkpoints.experts import Experts
from ktops.checkpoints.layer import PROJECTIONS
from ktops.checkpoints.quality import Activation, compare, find_activation
from ktops.checkpoints.writer import small_files
from ktops.cli.errors import UserError, told
from ktops.integrations.loading import functions_of
from ktops.integrations.transformers.architectures import Unsupported
from ktops.ops.activation import ExpertFunction

REPORT = "ktops-report.json"


@dataclass(frozen=True)
class Options:
    """Arguments of the command; group_size defaults to the format's, method to rtn."""

    source: Path
    destination: Path
    weight_format: str
    group_size: int | None = None
    method: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Part:
    """A layer, the name to write it under, and its gate_up_proj and down_proj in the new format."""

    name: str
    layer: Layer
    experts: tuple[Experts, Experts]


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
    with told(options.destination, (CheckpointError, ImportError), interrupted=again):
        checkpoint = open_checkpoint(options.source)
        parts = _plan(checkpoint, options)
        partial = CheckpointWriter.partial_path(options.destination)
        interrupted = partial.exists()
        writer = CheckpointWriter(
            options.destination, _settings(options, checkpoint), overwrite=options.overwrite
        )
        done = len(writer.finished_layers)
        if done:
            console.print(f"  continuing: {done} of {len(parts)} layers are written and verified")
        elif interrupted:
            console.print(f"  {partial} is damaged, or the options or the source changed: starting over")
        _, problem = _functions(checkpoint)
        if problem is not None:
            console.print(f"  {problem}. from_pretrained will refuse {options.destination}", soft_wrap=True)
        report = _write(writer, checkpoint, parts, options)
        writer.finish()
    _show(report, options, console)
    return report


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
    parts = []
    for layer in checkpoint.layers:
        try:
            both = layer.experts(
                options.weight_format, group_size=options.group_size, method=options.method or "rtn"
            )
        except CheckpointError:
            raise
        except ValueError as error:
            raise UserError(f"--format {options.weight_format}: {layer.name}: {error}") from None
        parts.append(Part(layer.written_name, layer, both))
    return parts


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


def _write(writer: CheckpointWriter, checkpoint: Checkpoint, parts: list[Part], options: Options) -> dict:
    """Runs all steps of a conversion except the last. Returns the report."""
    file = writer.partial / REPORT
    measured = json.loads(file.read_text())["layers"] if file.exists() else []
    layers = {layer["name"]: layer for layer in measured}
    functions, problem = _functions(checkpoint)
    activation = _activation(functions, problem, checkpoint.config)
    others = {} if _is_gguf(checkpoint) else checkpoint.other_tensors()
    left = [part for part in parts if not writer.has(part.name)]
    total = 2 * sum(part.layer.num_experts for part in left) + len(others)
    with progress("converting", total) as step:
        for part in parts:
            if not writer.has(part.name):
                biases = (part.layer.bias(name, torch.float32) for name in PROJECTIONS)
                writer.write_layer(part.name, *part.experts, *biases, step=step)
                layers.pop(part.name, None)
            if part.name not in layers:
                (written,) = open_checkpoint(writer.layer_file(part.name)).layers
                function = _function(part.layer, functions, activation.name)
                layers[part.name] = asdict(compare(part.name, part.layer, written, function))
                sizes = {experts.group_size for part in parts for experts in part.experts}
                size = sizes.pop() if len(sizes) == 1 else None
                report = _report(options, size, activation, list(layers.values()))
                file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if others:
            writer.write_tensors(others, step=step)
    _copy_files(writer, checkpoint, others)
    return json.loads(file.read_text())


def _functions(checkpoint: Checkpoint) -> tuple[dict[str, ExpertFunction], str | None]:
    """Returns what the experts compute, by module, and why ktops cannot load them, or None.

    There are no functions if transformers lacks the model, or if ktops cannot load one of them.
    """
    try:
        return functions_of({} if checkpoint.names is None else checkpoint.names.modules), None
    except Unsupported as reason:
        return {}, str(reason)


def _activation(functions: dict[str, ExpertFunction], problem: str | None, config: dict) -> Activation:
    """Returns the activation for the report, and whether outputs are compared."""
    if problem is not None:
        return Activation(None, f"outputs are not compared: {problem}")
    known = next(iter(functions.values()), None)
    return find_activation(config) if known is None else Activation(known.activation)


def _function(layer: Layer, functions: dict[str, ExpertFunction], name: str | None) -> ExpertFunction | None:
    """Returns what to compare the outputs of a layer with; None without the name of an activation.

    A layer that transformers skips computes what the others do.
    """
    if name is None:
        return None
    other = next(iter(functions.values()), ExpertFunction(name))
    return functions.get(layer.module or "", other)._replace(gating=layer.gating)


def _is_gguf(checkpoint: Checkpoint) -> bool:
    """True for GGUF files, whose other tensors have ggml's names and blocks, which only ktops reads here."""
    return any(view.file.path.suffix == ".gguf" for view in checkpoint.tensors.values())


def _report(options: Options, group_size: int | None, activation: Activation, layers: list[dict]) -> dict:
    def mean(*names: str) -> float | None:
        errors = [layer[name] for layer in layers for name in names]
        if None in errors:
            return None
        return (sum(error**2 for error in errors) / len(errors)) ** 0.5

    size, dense = (sum(layer[name] for layer in layers) for name in ("bytes", "bytes_bf16"))
    return {
        "ktops": ktops.__version__,
        "source": options.source.resolve().name,
        "format": options.weight_format,
        "group_size": group_size,
        "method": options.method or "rtn",
        "bytes": size,
        "bytes_bf16": dense,
        "ratio": dense / size,
        "activation": activation.name,
        "activation_note": activation.note,
        "relative_error": mean("gate_up_error", "down_error"),
        "output_error": mean("output_error"),
        "layers": layers,
    }


def _copy_files(writer: CheckpointWriter, checkpoint: Checkpoint, others: dict) -> None:
    """Copies the tokenizer and other small files, and writes a config.json for ktops' loader."""
    if not checkpoint.path.is_dir():
        return
    writer.copy(path for path in small_files(checkpoint.path) if path.name != REPORT)
    if checkpoint.config:
        writer.write_config(converted_config(checkpoint.config, others))


def _show(report: dict, options: Options, console: Console) -> None:
    group = f", group {report['group_size']}" if report["group_size"] else ""
    errors = f"relative error of the weights {report['relative_error']:.2g}"
    if report["output_error"] is not None:
        worst = max(report["layers"], key=lambda layer: layer["output_error"])
        errors += f", of the outputs {report['output_error']:.2g} "
        errors += f"(largest: {worst['output_error']:.2g} in {worst['name']})"
    if report["activation_note"]:
        errors += f"; {report['activation_note']}"
    for line in (
        f"{len(report['layers'])} layers of experts: {format_bytes(report['bytes'])} in {report['format']}"
        f"{group} (bf16: {format_bytes(report['bytes_bf16'])}, {report['ratio']:.2f} times smaller)",
        errors,
        f"written: {options.destination}; {REPORT} lists the errors of every layer",
    ):
        console.print(f"  {line}", soft_wrap=True)
