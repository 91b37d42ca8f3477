"""The accelerator of this machine, and the room in its memory."""

import torch

from ktops._display import format_bytes


def find_accelerator(device: torch.device | str | int, caller: str) -> torch.device:
    """Returns a device of this machine's accelerator, with its index.

    Args:
        device: such as "cuda", which is the current one, "cuda:1" or 1.
        caller: begins the message of an error.

    Raises:
        ValueError: not a device, the CPU, or a device that is not in this machine.

    Example:
        >>> find_accelerator("cuda", "offload_experts")
        device(type='cuda', index=0)
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"{caller}: device must be an accelerator such as cuda, got {device!r}") from None
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is None or found.type != here.type:
        there_is = "none" if here is None else here.type
        raise ValueError(
            f"{caller}: device must be an accelerator of this machine, of which torch {torch.__version__} "
            f"finds {there_is}, got {str(device)!r}"
        )
    count = torch.accelerator.device_count()
    index = torch.accelerator.current_device_index() if found.index is None else found.index
    if index >= count:
        raise ValueError(f"{caller}: device must be {here.type}:0 to {here.type}:{count - 1}, got {found}")
    return torch.device(found.type, index)


def free_memory(device: torch.device) -> int | None:
    """Returns the bytes that torch can still allocate on a device, None if the device does not say."""
    try:
        free, _ = torch.accelerator.get_memory_info(device)
    except RuntimeError:
        return None
    unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return free + unused


def require_room(device: torch.device, nbytes: int, what: str) -> None:
    """Raises torch.OutOfMemoryError unless a device has room for ``nbytes``.

    Args:
        what: what needs them, the subject of the message.
    """
    free = free_memory(device)
    if free is not None and nbytes > free:
        raise torch.OutOfMemoryError(
            f"{what} needs {format_bytes(nbytes)} on {device}, which has {format_bytes(free)} free"
        )
