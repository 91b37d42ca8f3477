"""Other libraries, each imported only when used."""

import importlib.util
import sys

__all__ = ["disable", "enable"]


def enable() -> None:
    """Register the experts implementation "ktops" in transformers, and route PEFT's expert LoRA into the op.

    To be called once, before a model is made; a second call does nothing. PEFT is optional.

    Raises:
        ImportError: transformers is not installed, or has no experts interface.

    Example:
        >>> ktops.enable()
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", experts_implementation="ktops")
    """
    from ktops.integrations import transformers

    transformers.enable()
    enable_peft()


def enable_peft() -> None:
    """Route PEFT's expert LoRA into the op, if PEFT and the transformers that it needs are installed."""
    if all(importlib.util.find_spec(name) is not None for name in ("transformers", "peft")):
        from ktops.integrations import peft

        peft.enable()


def enable_saving(model) -> None:
    """Lets transformers save a model whose experts are in formats, so that from_pretrained loads it.

    Does nothing if transformers is not imported or is too old for :func:`enable`.
    """
    if "transformers" in sys.modules and importlib.util.find_spec("transformers.core_model_loading"):
        from ktops.integrations.transformers import saving

        saving.attach(model)


def disable() -> None:
    """Undo :func:`enable`. Models that still ask for "ktops" raise in forward: set another implementation."""
    from ktops.integrations import transformers

    transformers.disable()
    if importlib.util.find_spec("peft") is not None:
        from ktops.integrations import peft

        peft.disable()
