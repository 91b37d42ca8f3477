"""Reads the configuration of `ktops finetune config.yaml`, which has the keys of LLaMA-Factory."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktops.cli.errors import UserError
from ktops.cli.finetune.config_keys import DEFAULTS, KEYS, LAUNCH, Setter, no_effect
from ktops.cli.finetune.options import EVALUATION, flag
from ktops.cli.finetune.yaml_file import Entry, read_yaml
from ktops.integrations import settings

OTHERS = "grouped_mm"
"""What runs the experts with ``use_kt: false``: the default of transformers."""

_DISPLACES = {
    "epochs": ("max_steps",),
    "warmup_ratio": ("warmup_steps",),
    "weight_format": ("group_size",),
    "resume": ("overwrite",),
    "overwrite": ("resume",),
} | {name: tuple(other for other in EVALUATION if other != name) for name in EVALUATION}
"""Option -> options that must not come from the file if it was given on the command line."""


@dataclass(frozen=True)
class Config:
    """A configuration file.

    Attributes:
        options: option -> value, with LLaMA-Factory's defaults for what the file leaves out.
        origins: option -> the key that set it, and its line.
        notes: what the user should know about the keys, one line each.
    """

    path: Path
    options: dict[str, Any]
    origins: dict[str, Entry]
    notes: tuple[str, ...] = ()

    def with_command_line(self, given: dict[str, Any]) -> dict[str, Any]:
        """Returns the options of the file, overridden by those given on the command line."""
        displaced = {other for name in given for other in _DISPLACES.get(name, ())}
        kept = {name: value for name, value in self.options.items() if name not in displaced}
        return kept | given

    def explain(self, message: str, given: dict[str, Any]) -> str:
        """Returns an error message, and which keys set the options that it names."""
        keys = [
            f"  {flag(option)} is {key} in {self.path}, line {line}"
            for option, (key, line) in self.origins.items()
            if option not in given and re.search(rf"{flag(option)}(?![\w-])", message)
        ]
        return "\n".join([message, *keys])


def read_config(path: Path) -> Config:
    """Reads a configuration file.

    Raises:
        UserError: it is not YAML, or a key is unknown, has a value of the wrong type, or asks for something
            that `ktops finetune` does not do; the message names the file, the line and the key.
    """
    entries = {key: entry for key, entry in read_yaml(path).items() if entry.value is not None}
    options: dict[str, Any] = {}
    origins: dict[str, Entry] = {}

    def set_options(made: dict[str, Any], key: str, line: int) -> None:
        for option, value in made.items():
            if options.get(option, value) != value:
                other, at = origins[option]
                raise UserError(f"{path}, line {line}: {key} contradicts {other} in line {at}")
            options[option], origins[option] = value, Entry(key, line)

    kt = {key: entry for key, entry in entries.items() if settings.is_key(key)}
    found = _settings(path, kt)
    on_device = entries.get("device", Entry("cpu", 0)).value != "cpu"
    for key, made in _kt_options(found, kt, on_device).items():
        set_options(made, key, kt[key].line)
    for key, (value, line) in entries.items():
        if key in kt:
            continue
        setter = _setter(path, key, line)
        try:
            set_options(setter(value), key, line)
        except ValueError as error:
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            raise UserError(f"{path}, line {line}: {key} is {shown}: {error}") from None
    _require_evaluation(path, entries, options)
    if options.get("resume"):
        options.pop("overwrite", None)
    return Config(path, _with_defaults(options), origins, _notes(entries, found, on_device))


def _setter(path: Path, key: str, line: int) -> Setter:
    if key not in KEYS:
        close = difflib.get_close_matches(key, KEYS.keys() | settings.KEYS, n=1, cutoff=0.7)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(
            f"{path}, line {line}: unknown key {key}.{hint} docs/cli.md lists the keys; LLaMA-Factory itself "
            f"takes others: {LAUNCH}"
        )
    return KEYS[key]


def _settings(path: Path, kt: dict[str, Entry]) -> settings.Settings | None:
    """Returns what the keys of KTransformers ask for; None with ``use_kt: false``."""
    try:
        return settings.take_settings({"use_kt": True} | {key: entry.value for key, entry in kt.items()})
    except ValueError as error:
        named = {found.start(): key for key in kt if (found := re.search(rf"\b{key}\b", str(error)))}
        where = f"{path}, line {kt[named[min(named)]].line}" if named else path
        raise UserError(f"{where}: {error}") from None


def _kt_options(
    found: settings.Settings | None, kt: dict[str, Entry], on_device: bool
) -> dict[str, dict[str, Any]]:
    """Returns key -> the options that it sets; on_device says whether the file names an accelerator."""
    if found is None:
        return {"use_kt": {"experts_implementation": OTHERS}}
    made: dict[str, dict[str, Any]] = {
        "kt_backend": {
            "weight_format": found.backend.format,
            "group_size": found.backend.group_size if found.backend.format else None,
            "freeze_experts": not found.trains_experts,
        },
        "kt_num_threads": {"num_threads": found.num_threads},
        "kt_num_gpu_experts": {"num_gpu_experts": found.num_gpu_experts if on_device else None},
        "kt_weight_path": {"experts_path": found.weight_path and str(found.weight_path.resolve())},
    }
    stand_ins = {"kt_backend": "kt_expert_weight_format", "kt_weight_path": "kt_expert_checkpoint_path"}
    keys = {key: next((k for k in (key, stand_ins.get(key), "kt_config") if k in kt), "") for key in made}
    given: dict[str, dict[str, Any]] = {keys[key]: {} for key in made if keys[key]}
    for key, options in made.items():
        if keys[key]:
            given[keys[key]] |= {
                name: value for name, value in options.items() if value is not None and value is not False
            }
    return given


def _require_evaluation(path: Path, entries: dict[str, Entry], options: dict[str, Any]) -> None:
    """Raises UserError for evaluations without an interval; drops the interval without evaluations."""
    key = "eval_strategy" if "eval_strategy" in entries else "evaluation_strategy"
    if entries.get(key, Entry("no", 0)).value != "steps":
        options.pop("eval_steps", None)
    elif "eval_steps" not in options:
        raise UserError(f"{path}, line {entries[key].line}: {key}: steps needs eval_steps")


def _with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    evaluates = any(name in options for name in EVALUATION)
    return {
        name: value for name, value in DEFAULTS.items() if not (evaluates and name in EVALUATION)
    } | options


def _notes(entries: dict[str, Entry], found: settings.Settings | None, on_device: bool) -> tuple[str, ...]:
    notes = []
    if "use_kt" in entries and found is None:
        notes.append(f"use_kt: false: transformers runs the experts ({OTHERS}), not ktops")
    if "template" in entries:
        template = entries["template"].value
        notes.append(f"template {template}: the chat template of the model's tokenizer is used instead")
    idle = [key for key in entries if KEYS.get(key) is no_effect and key != "template"]
    idle += found.without_effect if found else [key for key in entries if key.startswith("kt_")]
    if found and on_device:
        idle = [key for key in idle if key != "kt_num_gpu_experts"]
    if idle:
        notes.append(f"without effect in ktops finetune: {', '.join(idle)}")
    return tuple(notes)
