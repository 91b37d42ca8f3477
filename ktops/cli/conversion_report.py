"""The errors of a conversion: ktops-report.json, and the lines that `ktops convert` prints."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import ktops
from ktops._display import format_bytes
from ktops._workers import Workers
from ktops.checkpoints import Checkpoint, Layer, open_checkpoint
from ktops.checkpoints.quality import Activation, Extent, compare, find_activation, most, sample
from ktops.checkpoints.stream import write_json
from ktops.integrations.loading import functions_of
from ktops.integrations.transformers.architectures import Unsupported
from ktops.ops.activation import ExpertFunction

REPORT = "ktops-report.json"

EXTENTS: dict[str, Callable[[Layer], Extent | None]] = {
    "full": most,
    "sample": sample,
    "none": lambda layer: None,
}
"""What `--report` compares of a layer."""


class ConversionReport:
    """Compares layers with their source, and keeps the results in a file.

    Args:
        file: where an interrupted conversion with this report has left its results.
        settings: source, format, group_size and method, for the report.
        kind: one of EXTENTS.

    Attributes:
        problem: why ktops cannot load what the conversion writes, or None.
    """

    def __init__(
        self, file: Path, checkpoint: Checkpoint, settings: dict[str, Any], kind: str, workers: Workers
    ) -> None:
        self.file, self.settings, self.kind, self._workers = file, settings, kind, workers
        self._functions, self.problem = _functions(checkpoint)
        self._activation = _activation(self._functions, self.problem, checkpoint.config)
        found = json.loads(file.read_text()) if file.exists() else {}
        measured = found["layers"] if found.get("report") == kind else []
        self._layers = {layer["name"]: layer for layer in measured}

    def has(self, name: str) -> bool:
        """True if the layer of this name has been measured."""
        return name in self._layers

    def add(self, name: str, source: Layer, written: Path) -> None:
        """Compares a layer with the file that it has been written to."""
        (converted,) = open_checkpoint(written).layers
        function = _function(source, self._functions, self._activation.name)
        extent = EXTENTS[self.kind](source)
        self._layers[name] = asdict(compare(name, source, converted, function, extent, self._workers))
        write_json(self.file, self.contents)

    @property
    def contents(self) -> dict[str, Any]:
        layers = list(self._layers.values())
        size, dense, weights = (_total(layers, name) for name in ("bytes", "bytes_bf16", "measured_weights"))
        return {
            "ktops": ktops.__version__,
            **self.settings,
            "bytes": size,
            "bytes_bf16": dense,
            "ratio": dense / size,
            "report": self.kind,
            "measured_fraction": 2 * weights / dense,
            "activation": self._activation.name,
            "activation_note": self._activation.note,
            "relative_error": _mean(layers, "gate_up_error", "down_error"),
            "output_error": _mean(layers, "output_error"),
            "layers": layers,
        }


def show(report: dict, destination: Path, console: Console) -> None:
    """Prints the summary of a report."""
    group = f", group {report['group_size']}" if report["group_size"] else ""
    kind = report["report"]
    for line in (
        f"{len(report['layers'])} layers of experts: {format_bytes(report['bytes'])} in {report['format']}"
        f"{group} (bf16: {format_bytes(report['bytes_bf16'])}, {report['ratio']:.2f} times smaller)",
        _errors(report),
        f"written: {destination}" + ("" if kind == "none" else f"; {REPORT} lists the errors of every layer"),
    ):
        console.print(f"  {line}", soft_wrap=True)


def _errors(report: dict) -> str:
    if report["relative_error"] is None:
        return "errors are not measured (--report none)"
    errors = f"relative error of the weights {report['relative_error']:.2g}"
    if report["output_error"] is not None:
        worst = max(report["layers"], key=lambda layer: layer["output_error"])
        errors += f", of the outputs {report['output_error']:.2g} "
        errors += f"(largest: {worst['output_error']:.2g} in {worst['name']})"
    if report["report"] == "sample":
        errors += f"; measured on a sample, {report['measured_fraction']:.1%} of the weights"
    if report["activation_note"]:
        errors += f"; {report['activation_note']}"
    return errors


def _total(layers: list[dict], name: str) -> int:
    return sum(layer[name] for layer in layers)


def _mean(layers: list[dict], *names: str) -> float | None:
    errors = [layer[name] for layer in layers for name in names]
    if None in errors:
        return None
    return (sum(error**2 for error in errors) / len(errors)) ** 0.5


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
