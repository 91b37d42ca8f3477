"""Warns or raises where transformers would silently ignore ``experts_implementation="ktops"``.

transformers accepts the name for any model, but only experts modules in its experts interface look it up;
others, such as Llama-4's, ignore it. ktops warns about those. transformers also randomly initializes weights
that it does not find in the files. ktops raises an error if they belong to experts.
"""

import functools
import re

from transformers import PreTrainedModel, modeling_utils

from ktops._warn import warn_once
from ktops.checkpoints.errors import CheckpointError
from ktops.integrations.replacements import Replacements
from ktops.integrations.transformers.architectures import class_name, in_interface
from ktops.integrations.transformers.config import NAME, KTConfig
from ktops.integrations.transformers.device_map import (
    require_experts_on_cpu,
    require_room_without_experts,
    without_experts,
)
from ktops.integrations.transformers.loaded import adjusted, listed
from ktops.integrations.transformers.outside import is_replacement
from ktops.nn.find import find_experts

EXPERTS = re.compile(r"(^|\.)experts\.")
"""Matches the names of experts' weights."""

_replaced = Replacements()

_default: str | None = None
"""The implementation for models that ask for none; None leaves the choice to transformers."""


def enable() -> None:
    """Checks models when they are created, loaded and switched to "ktops"; a second call does nothing."""
    if not _replaced:
        _replaced.install(
            PreTrainedModel,
            post_init=_post_init,
            get_correct_experts_implementation=_get_correct_experts_implementation,
            set_experts_implementation=_set_experts_implementation,
            _adjust_missing_and_unexpected_keys=_adjust_missing_and_unexpected_keys,
        )
        _replaced.install(modeling_utils, _get_device_map=_get_device_map)


def disable() -> None:
    """Restores transformers' own methods."""
    _replaced.restore()


def set_default(name: str | None) -> None:
    """Sets the implementation for models that ask for none, while ktops is enabled; None undoes it."""
    global _default
    _default = name


def _post_init(model: PreTrainedModel) -> None:
    """``PreTrainedModel.post_init``, the end of creating a model."""
    _replaced.original["post_init"](model)
    loads_experts = isinstance(getattr(model.config, "quantization_config", None), KTConfig)
    if _asks_for_ktops(model) and not loads_experts:
        _warn_if_ignored(model)


def _get_correct_experts_implementation(model: PreTrainedModel, requested_experts: str | None) -> str:
    """``PreTrainedModel.get_correct_experts_implementation``, whose names are a fixed list before 5.7."""
    requested = _default if requested_experts is None else requested_experts
    if requested == NAME:
        return NAME
    return _replaced.original["get_correct_experts_implementation"](model, requested)


def _set_experts_implementation(model: PreTrainedModel, experts_implementation: str | dict) -> None:
    """``PreTrainedModel.set_experts_implementation``."""
    _replaced.original["set_experts_implementation"](model, experts_implementation)
    asked = experts_implementation
    if NAME in (asked.values() if isinstance(asked, dict) else (asked,)):
        _warn_if_ignored(model)


def _adjust_missing_and_unexpected_keys(model: PreTrainedModel, *found) -> tuple[set[str], set[str]]:
    """``PreTrainedModel._adjust_missing_and_unexpected_keys``, the end of loading a model."""
    adjust = functools.partial(_replaced.original["_adjust_missing_and_unexpected_keys"], model)
    missing, unexpected = adjusted(adjust, found)
    random = sorted(name for name in missing if EXPERTS.search(name))
    if random and _asks_for_ktops(model):
        raise CheckpointError(
            f"{listed(random)} of {type(model).__name__}: transformers does not find these weights of "
            "experts in the checkpoint and would initialize them at random. ktops may be able to read them: "
            "from_pretrained(..., quantization_config=ktops.KTConfig())"
        )
    return missing, unexpected


def _get_device_map(model: PreTrainedModel, *args) -> dict:
    """``modeling_utils._get_device_map``, which decides where ``from_pretrained`` loads every weight."""
    device_map = _replaced.original["_get_device_map"](model, *args)
    quantizer = args[-1]
    if isinstance(getattr(quantizer, "quantization_config", None), KTConfig):
        device_map = without_experts(model, device_map)
        require_room_without_experts(model, device_map, quantizer)
    elif _asks_for_ktops(model):
        require_experts_on_cpu(model, device_map)
    return device_map


def _asks_for_ktops(model: PreTrainedModel) -> bool:
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return any(getattr(part.config, "_experts_implementation", None) == NAME for part in parts)


def _warn_if_ignored(model: PreTrainedModel) -> None:
    for module in find_experts(model).values():
        if not in_interface(module) and not is_replacement(module):
            warn_once(
                f"ktops does not run {class_name(module)}: it is not in the experts interface of "
                "transformers, so experts_implementation='ktops' has no effect on it, and its own "
                "implementation runs. ktops.swap_experts(model) replaces experts outside the interface where "
                "it can."
            )
