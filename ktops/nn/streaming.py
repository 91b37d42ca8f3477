"""From how many tokens on an accelerator the experts of a module are computed there."""

from typing import Any

from torch import Tensor


def streaming_threshold(experts: Any, hidden_states: Tensor) -> int | None:
    """Returns the option of ``ktops.moe_sft`` for an experts module, which ``ktops.stream_experts`` sets.

    None in training mode, where a checkpointed forward computes the same as the one with gradients.
    """
    if hidden_states.is_cpu or experts.training:
        return None
    return getattr(experts, "stream_min_tokens", None)


def check_min_tokens(caller: str, argument: str, value: int | None) -> None:
    """Raises ValueError, with the caller and the argument, unless the value is None or positive."""
    if value is not None and value < 1:
        raise ValueError(f"{caller}: {argument} must be positive or None, got {value}")
