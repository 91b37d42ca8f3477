"""Other libraries, each imported only when used."""

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
    from ktops.integrations import peft, transformers

    transformers.enable()
    peft.enable_if_installed()


def disable() -> None:
    """Undo :func:`enable`. Models that still ask for "ktops" raise in forward: set another implementation."""
    from ktops.integrations import peft, transformers

    transformers.disable()
    peft.disable()
