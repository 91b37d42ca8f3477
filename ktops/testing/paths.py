"""Lists, forces and observes the paths of products (ktops_csrc/gemm/path.h)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import ktops


def path_names() -> tuple[str, ...]:
    """Returns the names of all paths: "dots", "panels", ..."""
    return tuple(torch.ops.kt.paths().split(","))


@contextmanager
def use_path(name: str) -> Iterator[None]:
    """Makes products with the base weights take path ``name`` wherever possible, in the whole process.

    Other products take their usual path; :func:`paths_taken` returns which.

    Raises:
        RuntimeError: there is no such path.

    Example:
        >>> with use_path("panels"), ktops.profile() as profile:
        ...     ktops.moe_sft(**inputs)
        >>> assert paths_taken(profile, "gate_up") == {"panels"}
    """
    previous = torch.ops.kt.force_path(name)
    try:
        yield
    finally:
        torch.ops.kt.force_path(previous)


def paths_taken(profile: ktops.Profile, *steps: str) -> set[str]:
    """Returns the names of the paths that products took in the named steps (default: all steps)."""
    return {path for step in profile.steps if not steps or step.name in steps for path in step.paths}
