"""Memory for weights, in pages of 2 MiB where the system grants them."""

import torch
from torch import Tensor


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Asks the system for huge pages for a new tensor that has not been written to, and returns it.

    Pages of 2 MiB take fewer entries of the cores' address caches and fewer page faults. The system grants
    them at first use, if ``/sys/kernel/mm/transparent_hugepage/enabled`` is not "never". Only those that lie
    in the tensor are asked for (madvise), so none takes memory that the tensor does not need. Tensors outside
    CPU memory are left as they are.

    Args:
        tensor: contiguous, of any shape and dtype.

    Raises:
        RuntimeError: the tensor is not contiguous.

    Example:
        >>> weights = in_huge_pages(torch.empty(128, 1536, 2048, dtype=torch.bfloat16))
    """
    if tensor.device.type == "cpu":
        torch.ops.kt.ask_for_huge_pages(tensor)
    return tensor


@torch.library.register_fake("kt::ask_for_huge_pages")
def _fake(tensor: Tensor) -> None:
    pass
