"""kt::cpu_capability: the kernels that this machine runs."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def cpu_capability() -> str:
    """Returns the name of the kernels in use: "scalar", "avx512_bf16", ...

    Importing ktops selects the best supported kernels. ``KTOPS_ISA`` or :func:`use_isa` selects others.

    Example:
        >>> ktops.cpu_capability()
        'avx512_bf16'
    """
    return torch.ops.kt.cpu_capability()


def cpu_capabilities() -> dict[str, bool]:
    """Returns all kernels compiled into ktops by name, best first, and whether this machine can run them.

    The order depends on the CPU. Where its bfloat16 dot product is slow, ``avx512`` comes before
    ``avx512_bf16``.

    Example:
        >>> ktops.cpu_capabilities()["scalar"]
        True
    """
    rows = (row.split("=") for row in torch.ops.kt.cpu_capabilities().split(","))
    return {name: supported == "1" for name, supported in rows}


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Uses the ``name`` kernels inside the ``with`` block, in every thread of the process.

    Args:
        name: a key of :func:`cpu_capabilities`.

    Raises:
        RuntimeError: if there are no such kernels, or the CPU lacks their instructions, or the operating
            system does not permit them. The message says which.

    Example:
        >>> with ktops.use_isa("scalar"):
        ...     y = ktops.moe_sft(x, ids, w, gate_up_proj, down_proj)
    """
    previous = cpu_capability()
    torch.ops.kt.set_cpu_capability(name)
    try:
        yield
    finally:
        torch.ops.kt.set_cpu_capability(previous)


def warn_of_refused_rows() -> None:
    """Warns if only the operating system keeps ktops from using better kernels."""
    refused = torch.ops.kt.cpu_refusals()
    if refused:
        message = f"ktops uses the {cpu_capability()} kernels, which are not the fastest. {refused}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
