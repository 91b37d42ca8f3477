"""Finds what an adapter was trained on: the model, and the weight format of its experts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktops.adapters.config import CONFIG, WEIGHTS
from ktops.adapters.errors import AdapterError
from ktops.checkpoints.errors import CheckpointError
from ktops.cli.errors import UserError
from ktops.cli.finetune import options as finetune_options

EXPERTS = ("experts_path", "weight_format", "group_size", "quantize_method")
"""Options of `ktops finetune` that change the experts an adapter was trained on."""

LINEAR = ("linear_format",)
"""Those that change its linear layers."""


@dataclass(frozen=True)
class Trained:
    """An adapter directory.

    Attributes:
        path: the directory.
        base: base_model_name_or_path in adapter_config.json, "" if it names none.
        options: the options of `ktops finetune`, if it wrote the adapter.
    """

    path: Path
    base: str
    options: dict[str, Any] | None

    def recorded(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Returns those of the options that were given."""
        options = self.options or {}
        return {name: options[name] for name in names if options.get(name) is not None}


def is_adapter(path: str | Path) -> bool:
    """True for a directory with an adapter and no model."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "config.json").is_file()


def require_no_adapter(path: str | Path, option: str) -> None:
    """Raises UserError if a directory that must hold a model holds an adapter.

    Args:
        path: the directory.
        option: what the user calls it.
    """
    if is_adapter(path):
        base = _read(Path(path) / CONFIG, option).get("base_model_name_or_path")
        name = f", {base}" if base else ""
        raise UserError(
            f"{option}: {path} is an adapter, not a model. Pass the model that it was trained on{name}"
        )


def read_trained(path: str | Path, option: str = "--adapter") -> Trained:
    """Reads what an adapter directory says about itself.

    Args:
        path: the directory.
        option: what the user calls it, for messages.

    Raises:
        UserError: it is no directory with an adapter that PEFT can load.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{option}: no such directory: {path}")
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise UserError(
                f"{option}: {path} has no {name}. Expected an adapter from PEFT; ktops export --for peft "
                "writes one from another program's"
            )
    base = _read(path / CONFIG, option).get("base_model_name_or_path") or ""
    recorded = path / finetune_options.FILE
    return Trained(path, base, _read(recorded, option) if recorded.is_file() else None)


def _read(file: Path, option: str) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{option}: {file} is not JSON: {error}") from None
    if not isinstance(contents, dict):
        raise UserError(f"{option}: {file} must hold a JSON object")
    return contents


def require_fit(trained: Trained, model: str, option: str = "--adapter") -> None:
    """Raises UserError unless an adapter fits a model; reads only headers of files.

    Args:
        trained: the adapter.
        model: the directory of the model.
        option: what the user calls the adapter, for messages.
    """
    from ktops.adapters.adapter import open_adapter

    try:
        open_adapter(trained.path, model)
    except (AdapterError, CheckpointError) as error:
        trained_on = f", which was trained on {trained.base}," if trained.base else ""
        raise UserError(f"{option}: {trained.path}{trained_on} does not fit {model}: {error}") from None


def is_trained_on(trained: Trained, model: str) -> bool:
    """True if an adapter's config names this model or none, or a model that this one was converted from."""
    if not trained.base or Path(trained.base).resolve() == Path(model).resolve():
        return True
    report = Path(model) / "ktops-report.json"
    if not report.is_file():
        return Path(trained.base).name == Path(model).name
    source = _read(report, "MODEL").get("source")
    return Path(trained.base).name in (source, Path(model).name)
