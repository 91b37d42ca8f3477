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
