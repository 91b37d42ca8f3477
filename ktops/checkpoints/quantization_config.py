"""Reads the settings of packed weights from the quantization config, in config.json or another file."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ktops.checkpoints.errors import CheckpointError

CONFIG = "config.json"
KEYS = ("quantization_config", "compression_config")
"""Keys in config.json; early versions of compressed-tensors wrote the second one."""

FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
"""Files with only the quantization config: of AutoGPTQ and GPTQModel, of AWQ, of AutoRound."""

STORED_LESS_ONE = {"gptq": 1, "gptq_v2": 0, "gptq_p": 0}
"""checkpoint_format -> offset to add to a stored zero point."""

NAME = re.compile(r"[\w.]+")
"""Matches the name of a module, as opposed to a pattern."""


class Packing(NamedTuple):
    """What is known about the packed weights of one module; None means unknown.

    Attributes:
        bits: bits per weight.
        group_size: number of columns that share a scale; -1 means all.
        symmetric: whether the zero point is the middle of the codes, regardless of what the file holds.
        zero_offset: offset to add to GPTQ's stored zero points: 1, or 0 in version 2 of the format.
        layout: the method's tensor layout: "gptq_v2", "gemv".
        data_type: "int", "float", "mx_int", ...
    """

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    zero_offset: int | None = None
    layout: str | None = None
    data_type: str | None = None


class _Part(NamedTuple):
    """The quantization config of a model or of a part of it.

    Attributes:
        owners: names of the part, outermost first, such as ("thinker", "text").
        config: the settings for every module.
        names, patterns: settings for single modules, by name or by the first pattern that matches.
    """

    owners: tuple[str, ...]
    config: dict
    names: dict[str, dict]
    patterns: list[tuple[re.Pattern, dict]]

    def own(self, module: str) -> dict:
        """Returns the settings specific to this module."""
        if module in self.names:
            return self.names[module]
        return next((said for pattern, said in self.patterns if pattern.match(module)), {})


class QuantizationConfig:
    """The quantization config of a checkpoint, or of the parts of a composite model.

    Args:
        config: the contents of config.json.
        beside: the contents of one of FILES, for settings that config.json lacks.

    Example:
        >>> config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "sym": True}}
        >>> QuantizationConfig(config).packing("model.layers.0.mlp.experts.0.up_proj").zero_offset
        1
    """

    def __init__(self, config: dict | None = None, beside: dict | None = None) -> None:
        found = [(owners, {**(beside or {}), **part}) for owners, part in _configs(config or {}, ())]
        self._parts = [_part(*part) for part in found or [((), beside or {})]]

    def __str__(self) -> str:
        """Returns "quant_method bitsandbytes", for messages; empty if nothing is known."""
        methods = dict.fromkeys(_method(part.config) for part in self._parts)
        return " and ".join(f"quant_method {method}" for method in methods if method)

    def packing(self, module: str) -> Packing:
        """Returns what is known about a module, by its name in the checkpoint."""
        names = set(module.split("."))
        part = max(self._parts, key=lambda part: len(names.intersection(part.owners)))
        config, method = part.config, _method(part.config)
        said = {**config, **part.own(module)}
        return Packing(
            bits=_value(said, int, "bits", "w_bit", "num_bits"),
            group_size=_value(said, int, "group_size", "q_group_size"),
            symmetric=_value(said, bool, "sym", "symmetric"),
            zero_offset=_zero_offset(config, method),
            layout=_layout(config, method),
            data_type=_text(said, "data_type", "type"),
        )


def read_quantization_config(folder: Path, config: dict) -> QuantizationConfig:
    """Reads the quantization config from a config.json and the other files of its folder.

    Raises:
        CheckpointError: a file is not a JSON object.
    """
    beside = (read_json(folder / name) for name in FILES if (folder / name).is_file())
    return QuantizationConfig(config, next(beside, None))


def read_json(path: Path) -> dict:
    """Reads the object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read or is not a JSON object; the message names it.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object")
    return value


def sub_configs(config: Mapping) -> dict[str, Mapping]:
    """Returns the configs of the parts of a composite model, such as text_config, by key."""
    return {
        key: part
        for key, part in config.items()
        if key.endswith("_config") and key not in KEYS and isinstance(part, Mapping)
    }


def without_quantization(config: Mapping) -> dict:
    """Returns a config.json without the quantization_config, its own and those of its parts."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def _configs(config: Mapping, owners: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Yields the quantization configs in a config and its sub-configs, with their parts of the model."""
    for key in KEYS:
        if isinstance(config.get(key), dict) and config[key]:
            yield owners, config[key]
            break
    for key, part in sub_configs(config).items():
        yield from _configs(part, (*owners, key.removesuffix("_config")))


def _text(config: dict, *keys: str) -> str | None:
    """Returns the first of these values that is a string, in lowercase."""
    found = (config[key] for key in keys if isinstance(config.get(key), str))
    return next((value.lower() for value in found), None)


def _method(config: dict) -> str | None:
    return _text(config, "quant_method", "method")


def _layout(config: dict, method: str | None) -> str | None:
    if method == "awq":
        return "llm-awq" if config.get("backend") == "llm-awq" else _text(config, "version", "format")
    return _text(config, "checkpoint_format", "format") if _is_gptq(config, method) else None


def _is_gptq(config: dict, method: str | None) -> bool:
    """True by the method, or by the keys that AutoGPTQ's own file always has, which names no method."""
    return method == "gptq" or (method is None and "bits" in config and "desc_act" in config)


def _zero_offset(config: dict, method: str | None) -> int | None:
    if method is not None and "auto" in method and "round" in method:
        packing = _text(config, "packing_format", "backend") or "auto_round:auto_gptq"
        return 1 if "gptq" in packing and "gptqmodel" not in packing else 0
    if _is_gptq(config, method):
        return STORED_LESS_ONE.get(_layout(config, method) or "gptq")
    return None


def _value(config: dict, kind: type, *keys: str):
    """Returns the first of these values with this type; None if there is none."""
    return next((config[key] for key in keys if type(config.get(key)) is kind), None)


def _dict(config: dict, key: str) -> dict:
    return config[key] if isinstance(config.get(key), dict) else {}


def _compiled(pattern: str) -> list[re.Pattern]:
    """Returns one pattern, or none if this is not a regular expression."""
    try:
        return [re.compile(pattern)]
    except (re.error, RecursionError, OverflowError):
        return []


def _part(owners: tuple[str, ...], config: dict) -> _Part:
    """Reads GPTQModel's ``dynamic``, AutoRound's ``extra_config``, compressed-tensors' ``config_groups``.

    The targets of a config group are module names, patterns prefixed with "re:", or class names; for experts,
    the class is Linear.
    """
    names: dict[str, dict] = {}
    patterns: list[tuple[re.Pattern, dict]] = []
    for key, said in _dict(config, "dynamic").items():
        if not isinstance(said, dict) or key.startswith("-:"):
            said = {}
        patterns += ((pattern, said) for pattern in _compiled(key.removeprefix("+:").removeprefix("-:")))
    for key, said in _dict(config, "extra_config").items():
        if isinstance(said, dict):
            names[key] = said
            if not NAME.fullmatch(key):
                patterns += ((pattern, said) for pattern in _compiled(rf".*?(?:{key})"))
    classes: dict = {}
    for group in _dict(config, "config_groups").values():
        said = _dict(group, "weights") if isinstance(group, dict) else {}
        targets = group.get("targets") if said else None
        for target in targets if isinstance(targets, list) else ():
            if not isinstance(target, str):
                continue
            if target.startswith("re:"):
                patterns += ((pattern, said) for pattern in _compiled(target.removeprefix("re:")))
            elif target == "Linear" or (target[:1].isupper() and not classes):
                classes = said
            else:
                names[target] = said
    return _Part(owners, {**config, **classes}, names, patterns)
