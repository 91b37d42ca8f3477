"""The memory that the operators keep between calls."""

from collections.abc import Callable

import torch

_caches: list[tuple[str, Callable[[], int], Callable[[], None]]] = []


def register_cache(name: str, held: Callable[[], int], release: Callable[[], None]) -> None:
    """Adds other memory that ktops keeps between calls to :func:`memory_stats` and :func:`empty_cache`.

    Args:
        name: its key in memory_stats, which adds up what several caches hold under the same name.
        held: returns its bytes.
        release: releases what is not in use.
    """
    _caches.append((name, held, release))


def memory_stats() -> dict[str, int]:
    """Returns statistics of the scratch memory that the operators use in this process.

    Each call keeps its intermediate results in one block, which later calls reuse. Up to 256 MiB of idle
    blocks are kept permanently, because touching fresh memory is slow. 2048 tokens of the largest models need
    less. More is kept as long as one of the last 512 calls needed it, which covers a training step. After at
    most 1024 calls that did not, the oldest blocks are returned to the system. Tensors (results and what
    forward saves for backward) are not included.

    Returns:
        bytes_in_use: bytes in blocks of running calls, 0 between calls.
        bytes_idle: bytes in blocks kept for later calls.
        bytes_peak: the maximum of bytes_in_use since the last :func:`empty_cache`. bytes_in_use + bytes_idle
            never exceeds it.
        blocks: the number of blocks, in use or idle.
        allocations: the number of blocks obtained from the system so far; constant once calls repeat.
        bytes_pinned: bytes of pinned memory for copies to and from an accelerator, in use or idle; not
            included in the numbers above.

    Example:
        >>> y = ktops.moe_sft(x, ids, w, gate_up_proj, down_proj)
        >>> ktops.memory_stats()["bytes_in_use"]
        0
    """
    names = ("bytes_in_use", "bytes_idle", "bytes_peak", "blocks", "allocations")
    stats = dict(zip(names, torch.ops.kt.memory_stats(), strict=True))
    for name, held, _ in _caches:
        stats[name] = stats.get(name, 0) + held()
    return stats


def empty_cache() -> None:
    """Returns the idle blocks of scratch memory, and pinned memory, to the system.

    Useful after calls with unusually many tokens. Running calls keep their blocks, and the next call
    allocates a new one.

    Example:
        >>> ktops.empty_cache()
        >>> ktops.memory_stats()["bytes_idle"]
        0
    """
    torch.ops.kt.empty_cache()
    for _, _, release in _caches:
        release()
