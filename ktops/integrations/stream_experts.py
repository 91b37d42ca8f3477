"""stream_experts: sets from how many tokens on a model's experts are computed on its accelerator."""

import warnings

from torch import nn

from ktops.integrations.swap import experts_in_op
from ktops.ops.moe_fwd_streamed import check_min_tokens


def stream_experts(model: nn.Module, min_tokens: int | None) -> list[str]:
    """Computes the experts of large batches on the accelerator that the hidden states are on.

    In evaluation mode and without gradients, a layer that gets at least ``min_tokens`` tokens copies the
    experts that have tokens to the accelerator, in portions, multiplies there, and keeps none of them. With
    fewer tokens, in training mode and with gradients, experts run on the CPU as before. Nothing changes
    where hidden states are on the CPU.

    Copying the experts takes the same time for any number of tokens, so this pays from some number on, often
    a few thousand; ``docs/devices.md`` has a formula and a table.

    Args:
        model: with experts that run through ktops, before or after it gets adapters. Call this after
            functions that replace experts, such as :func:`ktops.swap_experts`.
        min_tokens: the number of tokens of a layer's call, batch size times length. None turns it off.

    Returns:
        The names of the experts modules that were set.

    Raises:
        ValueError: no experts of the model run through ktops, or min_tokens is not positive.

    Example:
        >>> ktops.stream_experts(model, 4096)
        ['model.layers.0.mlp.experts', 'model.layers.1.mlp.experts']
    """
    check_min_tokens("stream_experts", "min_tokens", min_tokens)
    names, outside = experts_in_op(model, "stream_experts")
    if outside:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in outside.items())
        warnings.warn(
            f"stream_experts: experts that do not run through ktops are unchanged: {reasons}", stacklevel=2
        )
    for name in names:
        model.get_submodule(name).stream_min_tokens = min_tokens  # type: ignore[assignment]  # no tensor, no module
    return names
