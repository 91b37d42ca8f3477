"""kt::cpu_capability: which kernels this machine runs."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def cpu_capability() -> str:
    """Name of the row of kernels in use: "scalar", "avx512_bf16", ...

    The first supported row is chosen when ktops is imported; ``KTOPS_ISA`` or :func:`use_isa` choose another.

    Example:
        >>> ktops.cpu_capability()
        'avx512_bf16'
    """
    return torch.ops.kt.cpu_capability()


def cpu_capabilities() -> dict[str, bool]:
    """Every row of kernels compiled into ktops, best first, and whether this machine can run it.

    Best for this CPU: where its bfloat16 dot product is slow, ``avx512`` comes before ``avx512_bf16``.
    """
    rows = (row.split("=") for row in torch.ops.kt.cpu_capabilities().split(","))
    return {name: supported == "1" for name, supported in rows}


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the kernels of row ``name`` inside the ``with`` block, in every thread of the process.

    Raises:
        RuntimeError: there is no such row, this CPU lacks its instructions, or the operating system does not
            permit them; the message says which.

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
    """Warns if a better row than the default one is out of reach only because of the operating system."""
    refused = torch.ops.kt.cpu_refusals()
    if refused:
        message = f"ktops runs the kernels {cpu_capability()}, not the fastest ones. {refused}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
