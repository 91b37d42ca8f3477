"""What is written beside packed weights about them: config.json's quantization_config, and others."""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
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
        found = list(_configs(config or {}, ()))
        self._parts = [(owners, {**(beside or {}), **part}) for owners, part in found]
        self._parts = self._parts or [((), beside)] * bool(beside)
        self.packing = lru_cache(maxsize=None)(self._packing)

    def __str__(self) -> str:
        """For messages: "quant_method bitsandbytes"; empty if nothing is known."""
        methods = dict.fromkeys(_method(part) for _, part in self._parts)
        return " and ".join(f"quant_method {method}" for method in methods if method)

    def _packing(self, module: str) -> Packing:
        """What is known of a module, by its name in the checkpoint."""
        names = set(module.split("."))
        config = max(self._parts, key=lambda part: len(names.intersection(part[0])), default=((), {}))[1]
        if isinstance(config.get("config_groups"), dict):
            return _of_group(_weights(config["config_groups"], module))
        method = _method(config)
        own = {**config, **_override(config, module)}
        bits, group_size = (own.get(key, own.get(older)) for key, older in SIZES)
        sizes = (value if type(value) is int else None for value in (bits, group_size))
        symmetric = own["sym"] if isinstance(own.get("sym"), bool) else None
        return Packing(
            *sizes, symmetric, _zero_offset(config, method), _layout(config, method), _text(own, "data_type")
        )


SIZES = (("bits", "w_bit"), ("group_size", "q_group_size"))


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


def _override(config: dict, module: str) -> dict:
    """What GPTQModel's ``dynamic`` (the first pattern) or AutoRound's ``extra_config`` says of a module."""
    for key, value in _dict(config, "dynamic").items():
        negative, pattern = key.startswith("-:"), key.removeprefix("+:").removeprefix("-:")
        if _matches(re.match, pattern, module):
            return {} if negative or not isinstance(value, dict) else value
    extra = _dict(config, "extra_config")
    if isinstance(extra.get(module), dict):
        return extra[module]
    patterns = (key for key, value in extra.items() if isinstance(value, dict))
    return next((extra[key] for key in patterns if _matches(re.fullmatch, key, module)), {})


def _dict(config: dict, key: str) -> dict:
    return config[key] if isinstance(config.get(key), dict) else {}


def _matches(match, pattern: str, module: str) -> bool:
    try:
        return match(pattern, module) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def _weights(groups: dict, module: str) -> dict:
    """The weights' arguments of the group of compressed-tensors that a module is in.

    Targets are names, patterns after "re:", or classes; the more exact one counts. Any class fits: those of
    modules are not known.
    """
    best, weights = -1, {}
    for group in groups.values():
        targets = group.get("targets") if isinstance(group, dict) else None
        for target in targets if isinstance(targets, list) else ():
            if not isinstance(target, str):
                continue
            pattern = target.removeprefix("re:")
            if target != pattern:
                rank = 1 if _matches(re.match, pattern, module) else -1
            else:
                rank = 2 if target == module else -1 if "." in target else 0
            if rank > best:
                best, weights = rank, _dict(group, "weights")
    return weights


def _of_group(weights: dict) -> Packing:
    bits, group_size = (weights.get(key) for key in ("num_bits", "group_size"))
    sizes = (value if type(value) is int else None for value in (bits, group_size))
    symmetric = weights["symmetric"] if isinstance(weights.get("symmetric"), bool) else None
    return Packing(*sizes, symmetric, data_type=_text(weights, "type"))
