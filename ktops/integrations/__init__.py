"""Integrations with other libraries, each imported only when used."""

__all__ = ["disable", "enable"]


def enable() -> None:
    """Registers ktops with transformers, and routes PEFT's LoRA on experts to the op.

    Models then accept ``experts_implementation="ktops"``, and ``from_pretrained`` accepts a
    :class:`ktops.KTConfig`. Call it once, before creating a model; a second call does nothing. PEFT is
    optional.

    Raises:
        ImportError: transformers is not installed, or has no experts interface.

    Example:
        >>> ktops.enable()
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", experts_implementation="ktops")
    """
    from ktops.integrations import data_parallel, peft, transformers

    transformers.enable()
    peft.enable_if_installed()
    data_parallel.enable()


def disable() -> None:
    """Undoes :func:`enable`. Models still set to "ktops" raise in forward; set another implementation."""
    from ktops.integrations import data_parallel, peft, transformers

    transformers.disable()
    peft.disable()
    data_parallel.disable()
