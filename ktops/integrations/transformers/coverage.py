"""Finds the experts of a model that do not run through the op."""

from typing import cast

from torch import nn

from ktops.integrations.transformers.architectures import (
    Unsupported,
    class_name,
    in_interface,
    operands,
)
from ktops.integrations.transformers.experts import NAME
from ktops.integrations.transformers.outside import ForwardReplacement
from ktops.nn.expert_list import KTExpert, KTExpertList
from ktops.nn.experts import KTExperts
from ktops.nn.find import find_experts


def experts_outside_op(model: nn.Module) -> tuple[int, dict[str, str]]:
    """Returns the number of a model's experts modules, and why some of them do not run through the op.

    Args:
        model: a transformers model, with or without PEFT adapters, swapped or not.

    Returns:
        The number of experts modules, and name -> reason for those that another implementation runs.

    Example:
        >>> experts_outside_op(model)
        (2, {'model.layers.1.mlp.experts': "GptOssExperts: ..."})
    """
    found = find_experts(model)
    reasons = {name: _reason(module) for name, module in found.items()}
    return len(found), {name: reason for name, reason in reasons.items() if reason is not None}


def _reason(experts: nn.Module) -> str | None:
    if isinstance(experts, ForwardReplacement):
        return experts.obstacle()
    if isinstance(experts, KTExpertList):
        run = any(cast(KTExpert, expert).runs_op() for expert in experts)
        return None if run else "the projections of its experts have adapters, hooks or dropout"
    if not isinstance(experts, KTExperts):
        if not in_interface(experts):
            return f"{class_name(experts)} is not in the experts interface of transformers"
        implementation = getattr(experts.config, "_experts_implementation", None)
        if implementation != NAME:
            return f"{class_name(experts)} has experts_implementation={implementation!r}"
    try:
        operands(experts)
    except Unsupported as reason:
        return f"{class_name(experts)}: {reason}"
    return None
