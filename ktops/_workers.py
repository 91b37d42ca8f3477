"""Workers: threads that share independent tasks and return their results in order."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

AHEAD = 64
"""How many tasks may wait for a thread or have finished while the result of the first is not there yet."""

_current = threading.local()


class Workers:
    """Threads for tasks that mostly compute in PyTorch or wait for the disk, and so release Python's lock.

    Each task computes with one thread of PyTorch's, so tasks never wait for each other. With one thread in
    total, the caller's thread runs them.

    Args:
        num_threads: default: ``torch.get_num_threads()``.

    Example:
        >>> with Workers(2) as workers:
        ...     list(workers.in_order(partial(pow, 2, n) for n in range(4)))
        [1, 2, 4, 8]
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_threads = torch.get_num_threads() if num_threads is None else num_threads
        if self.num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
        self._stop = threading.Event()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        self._outer = torch.get_num_threads()
        torch.set_num_threads(1)
        if self.num_threads > 1:
            self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="ktops")
        return self

    def __exit__(self, *_) -> None:
        try:
            self.stop()
        finally:
            torch.set_num_threads(self._outer)

    def in_order(self, tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Yields the results of tasks in their order, while threads run later ones.

        Tasks are taken from the iterable, on the caller's thread, as they are needed. The exception of the
        first task that fails is raised here.
        """
        if self._pool is None:
            yield from (task() for task in tasks)
            return
        is_inference = torch.is_inference_mode_enabled()
        results: deque[Future[T]] = deque()
        for task in tasks:
            results.append(self._pool.submit(self._run, task, is_inference))
            while results and (results[0].done() or len(results) == AHEAD + 4 * self.num_threads):
                yield results.popleft().result()
        while results:
            yield results.popleft().result()

    def stop(self) -> None:
        """Drops the tasks that have not begun, and returns when no task is running."""
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _run(self, task: Callable[[], T], is_inference: bool) -> T:
        _current.stop = self._stop
        require_not_stopped()
        with torch.inference_mode(is_inference), torch.no_grad():
            return task()


def require_not_stopped() -> None:
    """Ends the current task if its workers are stopping. Long tasks call it from time to time.

    Raises:
        CancelledError
    """
    stop = getattr(_current, "stop", None)
    if stop is not None and stop.is_set():
        raise CancelledError
