"""KTConfig: kt-kernel's configuration of training, with the meaning that its keys have in ktops."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ktops.integrations.settings import Settings, take_settings

_OWN = {
    "kt_activation_policy",
    "kt_checkpoint_files",
    "kt_full_weight_grad",
    "kt_lora_alpha",
    "kt_lora_dropout",
    "kt_lora_rank",
    "kt_sharded_metadata",
    "kt_train_mode",
}
"""Fields that :mod:`ktops.integrations.settings` does not read, because other keys set them elsewhere."""

TRAIN_MODES = ("lora", "full", "hybrid")


@dataclass(frozen=True)
class KTActivationPolicy:
    """What happens to activations between forward and backward under gradient checkpointing.

    Attributes:
        cpu: "retain" keeps what the experts' forward saved, "recompute" runs the experts again.
        gpu: the same for the other layers.
    """

    cpu: str = "recompute"
    gpu: str = "recompute"

    def __post_init__(self) -> None:
        for name in ("cpu", "gpu"):
            value = getattr(self, name)
            if value not in ("retain", "recompute"):
                raise ValueError(f"kt_activation_policy: {name} must be retain or recompute, got {value!r}")
        if self.cpu == "recompute" and self.gpu == "retain":
            raise ValueError("kt_activation_policy: cpu must be retain if gpu is retain, got recompute")

    @classmethod
    def from_value(cls, value: "KTActivationPolicy | Mapping[str, str]") -> "KTActivationPolicy":
        """Returns the policy of a mapping with the keys cpu and gpu, or the policy itself.

        Raises:
            TypeError: it is neither.
            ValueError: other keys, or unknown values.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(
                f"kt_activation_policy must be a mapping with the keys cpu and gpu, got {value!r}"
            )
        if set(value) != {"cpu", "gpu"}:
            raise ValueError(f"kt_activation_policy must have the keys cpu and gpu, got {sorted(value)}")
        return cls(**value)


@dataclass
class KTConfig:
    """The 29 settings of kt-kernel's training; see ``docs/compat.md`` for what they mean in ktops.

    None means not given. Then a variable ACCELERATE_KT_<NAME> counts, such as ACCELERATE_KT_BACKEND, and
    after it the default.

    Raises:
        TypeError: a keyword that is no field.
        ValueError: a value that ktops does not accept; the message names the field.

    Example:
        >>> KTConfig(kt_backend="AMXINT8", kt_lora_rank=8).kt_lora_alpha
        16.0
    """

    kt_backend: str | None = None
    kt_num_threads: int | None = None
    kt_tp_enabled: bool | None = None
    kt_threadpool_count: int | None = None
    kt_weight_path: str | None = None
    kt_non_expert_weight_path: str | None = None
    kt_expert_weight_format: str | None = None
    kt_weight_lifecycle: str | None = None
    kt_expert_checkpoint_path: str | None = None
    kt_num_gpu_experts: int | None = None
    kt_skip_expert_loading: bool | None = None
    kt_share_backward_bb: bool | None = None
    kt_share_cache_pool: bool | None = None
    kt_force_fused_expert_lora: bool | None = None
    kt_max_cache_depth: int | None = None
    kt_model_max_length: int | None = None
    kt_activation_policy: KTActivationPolicy | Mapping[str, str] | None = None
    kt_lora_rank: int | None = None
    kt_lora_alpha: float | None = None
    kt_lora_dropout: float | None = None
    kt_train_mode: str | None = None
    kt_full_weight_grad: bool | None = None
    kt_use_lora_experts: bool | None = None
    kt_lora_expert_num: int | None = None
    kt_lora_expert_intermediate_size: int | None = None
    kt_checkpoint_files: list[str] | None = field(default=None, repr=False)
    kt_sharded_metadata: dict | None = field(default=None, repr=False)
    kt_wrap_fn: Callable[..., Any] | None = None
    kt_wrap_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in field_names():
            variable = os.environ.get(f"ACCELERATE_{name.upper()}")
            if getattr(self, name) is None and variable:
                setattr(self, name, _parsed(name, variable))
        policy = self.kt_activation_policy
        self.kt_activation_policy = KTActivationPolicy.from_value(policy or KTActivationPolicy())
        self.kt_train_mode = self.kt_train_mode or "lora"
        if self.kt_train_mode not in TRAIN_MODES:
            raise ValueError(
                f"kt_train_mode must be one of {', '.join(TRAIN_MODES)}, got {self.kt_train_mode!r}"
            )
        if self.kt_full_weight_grad is None:
            self.kt_full_weight_grad = self.kt_train_mode != "lora"
        self._check_lora()
        self.settings()

    def _check_lora(self) -> None:
        rank, dropout = self.kt_lora_rank, self.kt_lora_dropout or 0.0
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
            raise ValueError(f"kt_lora_rank must be an integer, not negative, got {rank!r}")
        if self.kt_lora_alpha is None and rank is not None:
            self.kt_lora_alpha = 2.0 * rank
        alpha = self.kt_lora_alpha
        if rank and not (isinstance(alpha, int | float) and alpha > 0):
            raise ValueError(f"kt_lora_alpha must be positive, got {alpha!r}")
        if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
            raise ValueError(f"kt_lora_dropout must be from 0 to below 1, got {dropout!r}")
        self.kt_lora_dropout = float(dropout)

    def settings(self) -> Settings:
        """Returns what the fields ask for besides adapters and checkpoint files.

        Raises:
            ValueError: a value that ktops does not accept.
        """
        given = {name: getattr(self, name) for name in field_names() if name not in _OWN}
        settings = take_settings({"use_kt": True, **given})
        assert settings is not None
        return settings

    @property
    def activation_policy(self) -> KTActivationPolicy:
        assert isinstance(self.kt_activation_policy, KTActivationPolicy)
        return self.kt_activation_policy

    @property
    def trains_adapters(self) -> bool:
        """Whether the experts get adapters, in modes lora and hybrid."""
        return self.kt_train_mode != "full" and self.settings().trains_experts

    @property
    def trains_weights(self) -> bool:
        """Whether the experts' own weights are trained, in modes full and hybrid."""
        return bool(self.kt_full_weight_grad)

    @classmethod
    def from_object(cls, given: Any) -> "KTConfig":
        """Returns the configuration that an object holds.

        Args:
            given: a KTConfig; a mapping of fields, where "enabled" is ignored; an object with an attribute
                ``kt_config`` or ``config`` that is one of these; or an object with fields as attributes.

        Raises:
            TypeError: none of these, or unknown fields.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            return cls(**{str(name): value for name, value in given.items() if name != "enabled"})
        for container in ("kt_config", "config"):
            nested = getattr(given, container, None)
            if nested is not None and nested is not given:
                files = getattr(given, "kt_checkpoint_files", None)
                found = cls.from_object(nested)
                return dataclasses.replace(found, kt_checkpoint_files=files or found.kt_checkpoint_files)
        attributes = {name: getattr(given, name) for name in field_names() if hasattr(given, name)}
        others = (name for name in getattr(given, "__dict__", ()) if name.startswith("kt_"))
        unknown = sorted(set(others) - attributes.keys())
        if unknown:
            raise TypeError(f"KTConfig: a {type(given).__name__} has unknown fields: {', '.join(unknown)}")
        if not attributes:
            raise TypeError(
                "KTConfig: expected a KTConfig, a mapping, or an object with an attribute kt_config or "
                f"attributes kt_*, got a {type(given).__name__}"
            )
        return cls(**attributes)


KTConfig.__module__ = "kt_kernel.sft.config"


def field_names() -> list[str]:
    return [each.name for each in dataclasses.fields(KTConfig)]


def _parsed(name: str, text: str) -> Any:
    """Returns the value of an environment variable: JSON where it is JSON, and otherwise the text itself."""
    if text.lower() in ("true", "yes", "false", "no"):
        return text.lower() in ("true", "yes")
    if name.endswith("_path"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
