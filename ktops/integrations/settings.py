"""The keys ``use_kt`` and ``kt_*`` of KTransformers' configurations, and what they mean to ktops.

One table for every place that reads them: YAML files of LLaMA-Factory under ``ktops launch``, those of
``ktops finetune``, and kt_kernel's KTConfig.
"""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ktops._warn import warn_once
from ktops.formats.plain import PLAIN
from ktops.numa import topology

if TYPE_CHECKING:
    from ktops.integrations.transformers.config import KTConfig


class Backend(NamedTuple):
    """How a backend stores the experts.

    Attributes:
        format: one of ``ktops.formats.names()``; None for the checkpoint's own.
        group_size: number of columns that share a scale; 0 for a whole row, None for the default.
        schemes: checkpoint schemes, as ``ktops.checkpoints`` names them, whose experts are used unchanged.
    """

    format: str | None
    group_size: int | None = 0
    schemes: tuple[str, ...] = ()


BACKENDS = {
    "AMXBF16": Backend("bf16"),
    "AMXINT8": Backend("int8"),
    "AMXINT4": Backend("int4"),
    "AMXINT4_1": Backend("uint4"),
    "AMXINT4_KGroup": Backend("int4", None),
    "AMXINT4_1KGroup": Backend("uint4", None),
    "FP8": Backend("fp8_e4m3", 128),
    "RAWINT4": Backend("int4", 32, ("pack-quantized",)),
    "MXFP4": Backend("mxfp4", 32),
    "INT8": Backend("int8"),
    "AMXFP8": Backend("fp8_e4m3", 128),
}
"""Backends for training, by their names in kt-kernel, where they may have the suffixes below."""

ALIASES = {"auto": Backend(None), "bf16": BACKENDS["AMXBF16"]}
"""Other values of ``kt_backend`` and ``kt_expert_weight_format``."""

WITHOUT_EFFECT = frozenset(
    {
        "kt_activation_policy",
        "kt_cpu_activation",
        "kt_force_fused_expert_lora",
        "kt_lora_expert_intermediate_size",
        "kt_lora_expert_num",
        "kt_max_cache_depth",
        "kt_model_max_length",
        "kt_moe_lora_device",
        "kt_num_gpu_experts",
        "kt_share_backward_bb",
        "kt_share_cache_pool",
        "kt_skip_expert_loading",
        "kt_threadpool_count",
        "kt_tp_enabled",
        "kt_weight_lifecycle",
    }
)
"""Keys that change where kt-kernel computes or what it buffers, never the result."""

REFUSED = {
    "kt_use_lora_experts": "additional experts made of LoRA are not supported; adapters on the experts are",
    "kt_non_expert_weight_path": "model_name_or_path must name the checkpoint of the other weights, and "
    "kt_weight_path that of the experts",
    "kt_full_weight_grad": "to train the experts themselves, use finetuning_type: full",
    "kt_lora_rank": "use lora_rank",
    "kt_lora_alpha": "use lora_alpha",
    "kt_lora_dropout": "use lora_dropout",
    "kt_wrap_fn": "ktops.swap_experts replaces modules",
    "kt_wrap_kwargs": "ktops.swap_experts replaces modules",
}
"""Keys that must be absent, null or false -> why, and what to use."""

_WITH_EFFECT = {
    "use_kt",
    "kt_backend",
    "kt_config",
    "kt_expert_checkpoint_path",
    "kt_expert_weight_format",
    "kt_num_threads",
    "kt_train_mode",
    "kt_weight_path",
}

DENSE = frozenset(PLAIN.values())
"""Formats of dense weights."""

KEYS = frozenset(_WITH_EFFECT | WITHOUT_EFFECT | REFUSED.keys())
"""All keys that this module knows."""


@dataclass(frozen=True)
class Settings:
    """What a configuration with ``use_kt: true`` asks for.

    Attributes:
        backend: how the experts are stored; ``Backend(None)`` keeps the checkpoint's format.
        trains_experts: False if ``kt_backend`` ends in _SkipLoRA: the experts get no adapters.
        num_threads: for ``torch.set_num_threads``; None leaves it.
        weight_path: another checkpoint to load the experts from.
        method: how :func:`ktops.quantize` chooses the scales of experts that ktops quantizes.
        mmap: whether to use experts where they lie in the files, as in :func:`ktops.load_experts`.
        num_gpu_experts: how many experts of each layer an accelerator computes, where the rest of the model
            is on one; without effect elsewhere.
        without_effect: the keys given that have no effect in ktops.
    """

    backend: Backend = ALIASES["auto"]
    trains_experts: bool = True
    num_threads: int | None = None
    weight_path: Path | None = None
    method: str = "rtn"
    mmap: bool = False
    num_gpu_experts: int = 0
    without_effect: tuple[str, ...] = ()

    def quantization_config(self, quantization: Mapping | None = None) -> "KTConfig | None":
        """Returns the ``quantization_config`` for from_pretrained, or None if it needs none.

        Args:
            quantization: the one in the config.json of the checkpoint, if it has one.

        Returns:
            A :class:`ktops.KTConfig`, or None for a dense checkpoint that stays dense.

        Raises:
            ktops.checkpoints.CheckpointError: weight_path cannot be read.
        """
        from ktops.integrations.transformers.config import KTConfig

        wanted = self.backend.format
        made = functools.partial(KTConfig, *self.backend[:2], self.method, mmap=self.mmap)
        if self.weight_path is not None:
            path, stored = str(self.weight_path), _stored(self.weight_path)
            if wanted is not None and stored <= DENSE:
                return made(experts_path=path)
            if wanted not in (None, *stored):
                warn_once(
                    f"kt_weight_path {path} has its experts in {' and '.join(sorted(stored))}. They stay so, "
                    f"although kt_backend asks for {wanted}"
                )
            return KTConfig(experts_path=path, mmap=self.mmap)
        if quantization is None and (wanted is None or wanted in DENSE) and not self.mmap:
            return None
        return made()


def _stored(path: Path) -> set[str]:
    """Returns the formats of the experts in a checkpoint."""
    from ktops.checkpoints import open_checkpoint

    return {experts.format for layer in open_checkpoint(path).layers for experts in layer.experts()}


def is_key(key: str) -> bool:
    """True for a key of KTransformers, known or not."""
    return key == "use_kt" or key.startswith("kt_")


def take_settings(config: dict[str, Any]) -> Settings | None:
    """Removes ``use_kt`` and all ``kt_*`` keys from a configuration, and returns what they ask for.

    Args:
        config: key -> value, as a YAML file has them; ``kt_config`` may hold a mapping of further ``kt_*``
            keys. Values may be strings, as on a command line.

    Returns:
        None if ``use_kt`` is absent, where other ``kt_*`` keys are an error, or false, where they mean
        nothing.

    Raises:
        ValueError: a key is unknown, has a value of the wrong type, or asks for what ktops does not do; the
            message names the key and the value. The configuration is unchanged.

    Example:
        >>> config = {"use_kt": True, "kt_backend": "AMXInt8", "kt_tp_enabled": True, "lora_rank": 8}
        >>> take_settings(config).backend.format, config
        ('int8', {'lora_rank': 8})
    """
    given = {key: value for key, value in config.items() if is_key(key)}
    nested = given.pop("kt_config", None)
    if nested is not None:
        given = _joined(given, nested)
    given = {key: value for key, value in given.items() if value is not None}
    _require_known(given)
    if given and "use_kt" not in given:
        raise ValueError(f"{', '.join(sorted(given))}: these keys need use_kt: true")
    enabled = _boolean("use_kt", given.pop("use_kt", False))
    settings = _read(given) if enabled else None
    for key in [key for key in config if is_key(key)]:
        del config[key]
    return settings


def _joined(given: dict[str, Any], nested: object) -> dict[str, Any]:
    if not isinstance(nested, Mapping):
        raise ValueError(f"kt_config must be a mapping of kt_* keys, got {nested!r}")
    inner = {str(key): value for key, value in nested.items() if key != "enabled"}
    if not _boolean("kt_config.enabled", nested.get("enabled", True)):
        raise ValueError(
            "kt_config.enabled is false, but use_kt is given: to turn ktops off, use use_kt: false"
        )
    if both := sorted(inner.keys() & given.keys()):
        raise ValueError(f"{', '.join(both)}: given twice, by itself and in kt_config")
    return given | inner


def _require_known(given: Mapping[str, Any]) -> None:
    for key in sorted(given.keys() - KEYS):
        close = difflib.get_close_matches(key, KEYS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown key {key}.{hint} Known keys: {', '.join(sorted(KEYS))}")


def _read(given: dict[str, Any]) -> Settings:
    for key, hint in REFUSED.items():
        if str(given.get(key, "")).lower() not in ("", "0", "0.0", "false", "no"):
            raise ValueError(f"{key} must be absent, got {given[key]!r}: {hint}")
    mode = given.get("kt_train_mode", "lora")
    if mode != "lora":
        raise ValueError(
            f"kt_train_mode must be lora, got {mode!r}: for full fine-tuning, use finetuning_type: full"
        )
    backend, trains_experts = _backend(given)
    threads = given.get("kt_num_threads")
    if threads is not None and not (_is_number(threads) and int(threads)):
        raise ValueError(f"kt_num_threads must be a positive integer, got {threads!r}")
    on_device = given.get("kt_num_gpu_experts", 0)
    if not _is_number(on_device):
        raise ValueError(f"kt_num_gpu_experts must be a number of experts, got {on_device!r}")
    paths = {key: given[key] for key in ("kt_weight_path", "kt_expert_checkpoint_path") if key in given}
    if len(paths) > 1:
        raise ValueError(f"{' and '.join(paths)}: ktops loads the experts from one checkpoint; give one")
    for key, path in paths.items():
        if not isinstance(path, str | Path) or not Path(path).exists():
            raise ValueError(f"{key} must name a checkpoint, a directory or a GGUF file, got {path!r}")
    return Settings(
        backend,
        trains_experts,
        num_threads=None if threads is None else int(threads),
        weight_path=next(map(Path, paths.values()), None),
        num_gpu_experts=int(on_device),
        without_effect=tuple(sorted(given.keys() & WITHOUT_EFFECT)),
    )


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and str(value).isdigit()


def _backend(given: Mapping[str, Any]) -> tuple[Backend, bool]:
    backend, trains_experts = find_backend(str(given.get("kt_backend", "auto")))
    stored = given.get("kt_expert_weight_format")
    if stored is None:
        return backend, trains_experts
    by_format, _ = find_backend(str(stored), "kt_expert_weight_format")
    if backend.format is not None and backend.format != by_format.format:
        raise ValueError(
            f"kt_expert_weight_format {stored!r} contradicts kt_backend {given['kt_backend']!r}, which "
            f"stores {backend.format}"
        )
    return by_format, trains_experts


def find_backend(name: str, key: str = "kt_backend") -> tuple[Backend, bool]:
    """Returns a backend by its name, in any case, and whether the experts get adapters.

    Raises:
        ValueError: no backend has this name; the message lists them.

    Example:
        >>> find_backend("AMXInt8_SFT_SkipLoRA")
        (Backend(format='int8', group_size=0, schemes=()), False)
    """
    lower = name.lower()
    stem = lower.removesuffix("_skiplora")
    known = {known.lower(): backend for known, backend in (BACKENDS | ALIASES).items()}
    backend = known.get(stem.removesuffix("_sft"))
    if backend is None:
        names = ", ".join([*ALIASES, *BACKENDS])
        raise ValueError(f"{key} must be one of {names}, each also with _SkipLoRA, got {name!r}")
    return backend, stem == lower


def set_num_threads(wanted: int) -> int:
    """Sets the number of threads of torch, and so of ktops, to at most one per core; returns it."""
    number = min(wanted, len(topology.usable_cpus()))
    torch.set_num_threads(number)
    return number


def _boolean(key: str, value: object) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    found = value if isinstance(value, bool) else words.get(str(value).lower())
    if found is None:
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return found
