"""The memory that the operators keep between calls."""

import torch


def memory_stats() -> dict[str, int]:
    """Bytes and blocks of scratch memory of the operators, of the whole process.

    A call takes one block for its intermediate results and leaves it to later calls. Up to 256 MiB of idle
    blocks are kept permanently, because fresh memory is slow to touch; 2048 tokens of the largest models need
    less. More is kept as long as one of the last 512 calls needed it, which covers a training step; after at
    most 1024 calls that did not, the oldest blocks go back to the system. Tensors (results, and what forward
    saves for backward) are not included.

    Returns:
        bytes_in_use: of the blocks of calls in progress, 0 between calls.
        bytes_idle: of the blocks kept for later calls.
        bytes_peak: the most that was in use at once since the last :func:`empty_cache`; in use and idle
            together never exceed it.
        blocks: number of blocks, in use or idle.
        allocations: blocks obtained from the system so far; constant once calls repeat.

    Example:
        >>> y = ktops.moe_sft(x, ids, w, gate_up_proj, down_proj)
        >>> ktops.memory_stats()["bytes_in_use"]
        0
    """
    names = ("bytes_in_use", "bytes_idle", "bytes_peak", "blocks", "allocations")
    return dict(zip(names, torch.ops.kt.memory_stats(), strict=True))


def empty_cache() -> None:
    """Gives the idle blocks of :func:`memory_stats` back to the system.

    Useful after calls with unusually many tokens. Calls in progress keep theirs; the next call allocates
    again.

    Example:
        >>> ktops.empty_cache()
        >>> ktops.memory_stats()["bytes_idle"]
        0
    """
    torch.ops.kt.empty_cache()
