"""Operators that no mode sees: those that Python calls when it frees an object, at any point of a program."""

from collections.abc import Callable
from typing import Any

import torch

_PRE_DISPATCH = torch._C.DispatchKeySet(torch._C.DispatchKey.PreDispatch)


def call_without_modes(operator: Callable[..., Any], *arguments: Any) -> Any:
    """Calls an operator whose arguments are not tensors out of sight of the modes of this thread.

    An object may be freed while a model is traced, or under a mode that counts operators. The call that
    releases what the object stood for is no part of that program: in a traced graph it would release again,
    by a number, whatever the number then stands for.

    Args:
        operator: an operator of ``torch.ops.kt``.
        arguments: what it is called with.

    Returns:
        What the operator returns.
    """
    with (
        torch._C.DisableTorchFunction(),
        torch._C._DisableTorchDispatch(),
        torch._C._ExcludeDispatchKeyGuard(_PRE_DISPATCH),
    ):
        return operator(*arguments)
