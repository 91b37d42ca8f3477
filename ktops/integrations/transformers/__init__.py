"""The experts implementation "ktops" for transformers."""

from ktops._warn import warn_once
from ktops.integrations.transformers.architectures import activation_name
from ktops.integrations.transformers.experts import NAME, experts_forward

__all__ = [
    "NAME",
    "activation_name",
    "disable",
    "enable",
]


def enable() -> None:
    """Registers "ktops" as an experts implementation; a second call does nothing.

    Raises:
        ImportError: transformers is not installed, or has no experts interface.
    """
    for registry in _registries():
        registry.register(NAME, experts_forward)
    from ktops.integrations.transformers import attention, auto, pretrained

    attention.enable()
    auto.enable()
    pretrained.enable()


def disable() -> None:
    """Unregisters the implementation."""
    for registry in _registries():
        registry._global_mapping.pop(NAME, None)
    from ktops.integrations.transformers import attention, auto, pretrained

    attention.disable()
    auto.disable()
    pretrained.disable()
    warn_once.cache_clear()


def _registries() -> list:
    """Returns the experts interface and its fp8 counterpart, where "ktops" warns and runs eager."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "ktops.enable() needs transformers>=5.0: pip install 'ktops[transformers]'. "
            "Without its experts interface, ktops.swap_experts(model) does the same."
        ) from error
    registries = [ALL_EXPERTS_FUNCTIONS]
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    except ImportError:
        return registries
    return [*registries, ALL_FP8_EXPERTS_FUNCTIONS]
