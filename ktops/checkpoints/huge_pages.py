"""Memory for weights, in pages of 2 MiB where the system grants them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ktops.numa import system

HUGE_PAGE = 2 << 20


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns an uninitialized tensor in CPU memory, like :func:`torch.empty`.

    The system is asked for huge pages (madvise), which take fewer entries of the cores' address caches and
    fewer page faults. It grants them at first use, if ``/sys/kernel/mm/transparent_hugepage/enabled`` is not
    "never". Only those that lie in the tensor are asked for, so none takes memory that the tensor does not
    need.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    if begin < end:
        system.advise(begin, end - begin, system.MADV_HUGEPAGE)
    return tensor
