"""The adapter_config.json of PEFT: ranks and scalings of modules, and what ktops cannot convert."""

import math
import re
from pathlib import Path
from typing import TypeGuard

from ktops.adapters.errors import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_CHANGE_THE_FORMULA = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "layer_replication",
    "arrow_config", "kasa_config", "monteclora_config", "alora_invocation_tokens",
)  # fmt: skip
"""Options of LoraConfig with which the update is not ``scaling * B @ A`` of the named weight."""

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of init_lora_weights with which the adapter belongs to changed base weights."""


class LoraSettings:
    """Ranks and scalings as PEFT reads them from adapter_config.json.

    Args:
        config: the contents of the file.
        where: its path, for messages.

    Raises:
        AdapterError: a value is missing or wrong, or the adapter is not plain LoRA.
    """

    def __init__(self, config: dict, where: Path) -> None:
        self.where = where
        kind = config.get("peft_type", "LORA")
        if kind != "LORA":
            raise AdapterError(f"{where}: peft_type must be LORA, got {kind!r}")
        for name in _CHANGE_THE_FORMULA:
            if config.get(name):
                raise AdapterError(f"{where}: {name}={config[name]!r} is not supported, only plain LoRA is")
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
            raise AdapterError(
                f"{where}: with init_lora_weights={start!r} the adapter belongs to changed base weights. "
                "Save it with path_initial_model_for_weight_conversion, as PEFT's documentation explains"
            )
        self.rank = self._positive(config, "r")
        self.alpha = self._positive(config, "lora_alpha")
        self.is_rslora = bool(config.get("use_rslora"))
        names = self._names(config, "target_modules")
        self.names_halves = any(re.search(r"\b(gate_proj|w1|all-linear)\b", name) for name in names)
        self.parameters = self._names(config, "target_parameters")
        self.ranks = self._patterns(config, "rank_pattern")
        self.alphas = self._patterns(config, "alpha_pattern")

    def targets(self, parameter: str) -> bool:
        """True if target_parameters name a parameter."""
        return any(name.rpartition(".")[2] == parameter for name in self.parameters)

    def _positive(self, config: dict, name: str) -> float:
        value = config.get(name)
        if not _is_positive(value):
            raise AdapterError(f"{self.where}: {name} must be a positive number, got {value!r}")
        return value

    def _names(self, config: dict, name: str) -> list[str]:
        value = config.get(name) or []
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise AdapterError(f"{self.where}: {name} must be a list of names, got {value!r}")
        return names

    def _patterns(self, config: dict, name: str) -> dict[str, float]:
        value = config.get(name) or {}
        if not isinstance(value, dict) or not all(map(_is_positive, value.values())):
            raise AdapterError(f"{self.where}: {name} must map names to positive numbers, got {value!r}")
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise AdapterError(
                    f"{self.where}: {name} has {pattern!r}, which is no regular expression: {error}"
                ) from None
        return value

    def scaling(self, weight: str, rank: int, key: str, *, is_gate_up: bool = False) -> float:
        """Returns the scaling of a weight.

        Args:
            weight: its name in the model, as PEFT matches it with patterns.
            rank: its rank in the file.
            key: its name in the file, for messages.
            is_gate_up: whether it holds gate and up. If target_modules name the two separately, PEFT
                doubles rank and alpha when it loads the config.

        Raises:
            AdapterError: the config gives another rank.
        """
        expected, alpha = _matching(self.ranks, weight, self.rank), _matching(self.alphas, weight, self.alpha)
        if is_gate_up and self.names_halves and rank == 2 * expected:
            expected, alpha = rank, 2 * alpha
        if rank != expected:
            raise AdapterError(
                f"{key}: has rank {rank}, but {self.where} says {expected}. Is the adapter for another model?"
            )
        return alpha / math.sqrt(rank) if self.is_rslora else alpha / rank


def _is_positive(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _matching(patterns: dict, name: str, default: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)
