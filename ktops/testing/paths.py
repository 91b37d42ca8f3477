"""The paths of products (ktops_csrc/gemm/path.h): their names, one of them forced, those that were taken."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import ktops


def path_names() -> tuple[str, ...]:
    """The names of all paths: "dots", "panels", ..."""
    return tuple(torch.ops.kt.paths().split(","))


@contextmanager
def use_path(name: str) -> Iterator[None]:
    """Makes products with the base weights take path ``name`` in the whole process, where it is possible.

    Where it isn't, they take the one that they would take without: :func:`paths_taken` tells.

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
    """Names of the paths that products took in the named steps, or in any of them."""
    return {path for step in profile.steps if not steps or step.name in steps for path in step.paths}
