"""What is written beside packed weights about them: config.json's quantization_config, and others."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ktops.checkpoints.errors import CheckpointError

CONFIG = "config.json"
KEYS = ("quantization_config", "compression_config")
"""Of config.json; the second one is what compressed-tensors wrote first."""

FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
"""The same in a file of its own: of AutoGPTQ and GPTQModel, of AWQ, of AutoRound."""

STORED_LESS_ONE = {"gptq": 1, "gptq_v2": 0, "gptq_p": 0}
"""checkpoint_format -> what a zero point in the file lacks."""


class Packing(NamedTuple):
    """What is known of the packed weights of one module; None: nothing.

    Attributes:
        bits: of a weight.
        group_size: columns that share a scale; -1: all.
        symmetric: whether the zero point is the middle of the codes, whatever the file holds.
        zero_offset: what the zero points in GPTQ's tensors lack: 1, or 0 in the second version of the format.
        layout: which of the layouts of its tensors a method has used: "gptq_v2", "gemv".
        data_type: "int", "float", "mx_int" ...
    """

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    zero_offset: int | None = None
    layout: str | None = None
    data_type: str | None = None


class _Part(NamedTuple):
    """The quantization config of a model, or of a part of it.

    Attributes:
        owners: names of the part, outermost first: ("thinker", "text").
        config: for every module.
        names, patterns: what is said of some modules, by their names, or for the first pattern that fits.
    """

    owners: tuple[str, ...]
    config: dict
    names: dict[str, dict]
    patterns: list[tuple[re.Pattern, dict]]

    def own(self, module: str) -> dict:
        """What is said of a module alone."""
        if module in self.names:
            return self.names[module]
        return next((said for pattern, said in self.patterns if pattern.match(module)), {})


class QuantizationConfig:
    """The quantization config of a checkpoint, or of the parts of a composite model.

    Args:
        config: of config.json.
        beside: of a file of its own, for what config.json does not say.

    Example:
        >>> config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "sym": True}}
        >>> QuantizationConfig(config).packing("model.layers.0.mlp.experts.0.up_proj").zero_offset
        1
    """

    def __init__(self, config: dict | None = None, beside: dict | None = None) -> None:
        found = [(owners, {**(beside or {}), **part}) for owners, part in _configs(config or {}, ())]
        self._parts = [_part(*part) for part in found or [((), beside or {})]]

    def __str__(self) -> str:
        """For messages: "quant_method bitsandbytes"; empty if nothing is known."""
        methods = dict.fromkeys(_method(part.config) for part in self._parts)
        return " and ".join(f"quant_method {method}" for method in methods if method)

    def packing(self, module: str) -> Packing:
        """What is known of a module, by its name in the checkpoint."""
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
    """What config.json and the other files of a folder say.

    Raises:
        CheckpointError: one of them is no JSON object.
    """
    beside = (read_json(folder / name) for name in FILES if (folder / name).is_file())
    return QuantizationConfig(config, next(beside, None))


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object")
    return value


def _configs(config: dict, owners: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict]]:
    """The quantization configs in a config and its sub-configs, with their parts of the model."""
    for key in KEYS:
        if isinstance(config.get(key), dict) and config[key]:
            yield owners, config[key]
            break
    for key, value in config.items():
        if key.endswith("_config") and key not in KEYS and isinstance(value, dict):
            yield from _configs(value, (*owners, key.removesuffix("_config")))


def _text(config: dict, *keys: str) -> str | None:
    """The first of these values that there is, in small letters."""
    found = (config[key] for key in keys if isinstance(config.get(key), str))
    return next((value.lower() for value in found), None)


def _method(config: dict) -> str | None:
    return _text(config, "quant_method", "method")


def _layout(config: dict, method: str | None) -> str | None:
    if method == "awq":
        return "llm-awq" if config.get("backend") == "llm-awq" else _text(config, "version", "format")
    return _text(config, "checkpoint_format", "format") if _is_gptq(config, method) else None


def _is_gptq(config: dict, method: str | None) -> bool:
    """By its name or, in AutoGPTQ's own file, which names none, by what it always says."""
    return method == "gptq" or (method is None and "bits" in config and "desc_act" in config)


def _zero_offset(config: dict, method: str | None) -> int | None:
    if method is not None and "auto" in method and "round" in method:
        packing = _text(config, "packing_format", "backend") or "auto_round:auto_gptq"
        return 1 if "gptq" in packing and "gptqmodel" not in packing else 0
    if _is_gptq(config, method):
        return STORED_LESS_ONE.get(_layout(config, method) or "gptq")
    return None


def _value(config: dict, kind: type, *keys: str):
    """The first of these values that is of the type; None if there is none."""
    return next((config[key] for key in keys if type(config.get(key)) is kind), None)


def _dict(config: dict, key: str) -> dict:
    return config[key] if isinstance(config.get(key), dict) else {}


def _compiled(pattern: str) -> list[re.Pattern]:
    """One, or none if this is no regular expression."""
    try:
        return [re.compile(pattern)]
    except (re.error, RecursionError, OverflowError):
        return []


def _part(owners: tuple[str, ...], config: dict) -> _Part:
    """Reads GPTQModel's ``dynamic``, AutoRound's ``extra_config``, compressed-tensors' ``config_groups``.

    The last one has targets: names, patterns after "re:", or classes, of which experts are Linear.
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


NAME = re.compile(r"[\w.]+")
"""Of a module, not a pattern."""
