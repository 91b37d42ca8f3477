"""Calls that run in the order of a CUDA stream, or else in a background thread on copies in CPU memory."""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ktops.devices import streams
from ktops.devices.streams import captured
from ktops.devices.transfer import download

Call = Future[Tensor] | streams.Pending
"""A call that has begun. Its ``result()`` is on the device of the stream, or in CPU memory."""


@functools.cache
def worker() -> ThreadPoolExecutor:
    """Returns the single thread that runs submitted work, in the order of submission."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="ktops-compat")


os.register_at_fork(after_in_child=worker.cache_clear)


def now(compute, *args) -> Future:
    """Like the submit method of an executor, but runs in this thread."""
    future: Future = Future()
    future.set_result(compute(*args))
    return future


def on_stream(cuda_stream, device: torch.device) -> AbstractContextManager:
    """Makes a stream and its device the current ones.

    Args:
        cuda_stream: a stream of the device, its address, or None for the device's current one.
    """
    known = streams.STREAMS.get(device.type)
    if known is None:
        return nullcontext()
    current = known.current(device)
    if cuda_stream is None or cuda_stream == known.address(current):
        cuda_stream = current
    elif isinstance(cuda_stream, int):
        cuda_stream = known.at(cuda_stream, device)
    return known.use(cuda_stream)


def in_host_memory(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns copies of tensors on a device; waits for them. Tensors in CPU memory are returned as they are.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if captured(tensors[0].device):
        raise RuntimeError(
            "KTMoEWrapper: a CUDA graph can capture only forwards for inference, and only if they can be "
            "computed in stream order (a warning says why not): start the server with --disable-cuda-graph"
        )
    return download(tensors)
