"""Memory for weights, in pages of 2 MiB where the system grants them."""

from collections.abc import Sequence
from functools import reduce

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


def stack_in_huge_pages(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Returns a new tensor [len(rows), N, ...] that holds the tensors of each row, concatenated.

    Gradients do not pass through it.

    Args:
        rows: the tensors of all rows are on one device. Their first dimensions add up to N in each row; the
            others are the same. Different dtypes are promoted, as :func:`torch.cat` does.

    Example:
        >>> gate, up = torch.ones(8, 3, 4), torch.zeros(8, 3, 4)
        >>> stack_in_huge_pages(list(zip(gate, up))).shape
        torch.Size([8, 6, 4])
    """
    first = rows[0][0]
    count = sum(len(tensor) for tensor in rows[0])
    dtype = reduce(torch.promote_types, (tensor.dtype for tensors in rows for tensor in tensors))
    out = in_huge_pages(first.new_empty(len(rows), count, *first.shape[1:], dtype=dtype))
    with torch.no_grad():
        for row, tensors in zip(out, rows, strict=True):
            torch.cat(list(tensors), out=row)
    return out


@torch.library.register_fake("kt::ask_for_huge_pages")
def _fake(tensor: Tensor) -> None:
    pass
