"""Makes reads of uninitialized memory visible."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Makes torch.empty, and aten::empty in an extension, fill tensors with NaN inside the ``with`` block.

    Integers are filled with their largest value. An operator that returns or reads an element that it never
    wrote then always gives NaN, instead of whatever the memory contained.

    Example:
        >>> with poisoned_memory():
        ...     assert torch.empty(3).isnan().all()
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # whose property mypy does not see
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
