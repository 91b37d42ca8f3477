"""The processes of one command, as torchrun starts them: what each does, and how they end together.

Without torchrun, or with one process, everything here concerns the only process.
"""

import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from typing import Any, TypeVar

from ktops._warn import warn_once
from ktops.cli.errors import Interrupted, UserError
from ktops.cli.info import numa_nodes

T = TypeVar("T")

TIMEOUT = timedelta(days=30)
"""How long processes wait for each other: planning, loading and checking large models takes its time. A
process that has ended is noticed at once, because its connections are closed."""

_GRACE = 10
"""Seconds that a process gets to print why all end."""


def is_main_process() -> bool:
    """Returns whether this is the process that prints, and writes files."""
    return rank() == 0


def rank() -> int:
    """Returns the number of this process among all."""
    return _run.rank if _run is not None else 0


def world_size() -> int:
    """Returns how many processes there are on all hosts."""
    return _run.world_size if _run is not None else 1


def local_world_size() -> int:
    """Returns how many processes there are on this host."""
    return _run.local_world_size if _run is not None else 1


def is_local_main_process() -> bool:
    """Returns whether this is the first process on this host."""
    return _run is None or _run.local_rank == 0


def all_gather(value: T) -> list[T]:
    """Returns the values that all processes pass, by rank. Waits for all."""
    if _run is None:
        return [value]
    import torch

    values: list[Any] = [None] * _run.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def all_reduce_sum(*numbers: int) -> list[int]:
    """Returns the sum over all processes of each number. Waits for all."""
    if _run is None:
        return list(numbers)
    import torch

    numbers_here = torch.tensor(numbers)
    torch.distributed.all_reduce(numbers_here)
    return numbers_here.tolist()


def barrier() -> None:
    """Returns when all processes have come here."""
    all_reduce_sum(0)


def on_main_process(function: Callable[[], T]) -> T:
    """Calls a function in the first process; returns its result in all, or raises its UserError in all."""
    if _run is None:
        return function()
    import torch

    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    result, raised = outcome
    if raised is not None:
        raise raised
    return result


def share_threads(wanted: int | None) -> tuple[int, int]:
    """Chooses the number of threads of this process.

    Processes that may use the same cores get equal parts of them, with one thread per core. One that is bound
    to cores of its own gets all of these. On a host with several NUMA nodes, processes are bound to them,
    unless they are bound already.

    Args:
        wanted: the number that the user wants for each process, or None.

    Returns:
        The number of threads that this process now has, and of CPUs that it may use.
    """
    import torch

    from ktops import numa
    from ktops.integrations.settings import set_num_threads
    from ktops.numa import topology
    from ktops.numa.binding import AlreadyBoundError

    if _run is not None and len(numa_nodes()) > 1:
        with suppress(AlreadyBoundError):  # by their launcher
            numa.bind_rank(_run.local_rank, _run.local_world_size)
    cpus = topology.usable_cpus()
    if _run is None:
        return (torch.get_num_threads() if wanted is None else set_num_threads(wanted)), len(cpus)
    here, cores = socket.gethostname(), {topology.core_of(topology.SYSTEM, cpu) for cpu in cpus}
    found = _by_host(all_gather((here, cores)))
    threads = set_num_threads(share_of(cores, found[here]) if wanted is None else wanted)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # without which accelerate would choose a number
    for host, number in _by_host(all_gather((here, threads))).items():
        there = len(set().union(*found[host]))
        if sum(number) > there:
            warn_once(
                f"ktops: the {len(number)} processes on {host} have {sum(number)} threads for {there} cores, "
                "so they wait for each other. Start fewer processes, or with fewer --num-threads"
            )
    return threads, len(cpus)


def share_of(cores: set[int], of_all: list[set[int]]) -> int:
    """Returns how many cores a process gets that may use ``cores``, if all may use those in ``of_all``.

    Example:
        >>> share_of({0, 1}, [{0, 1}, {0, 1}]), share_of({0, 1}, [{0, 1}, {2, 3}])
        (1, 2)
    """
    shares = (Fraction(1, sum(core in others for others in of_all)) for core in cores)
    return max(1, math.floor(sum(shares)))


def _by_host(values: list[tuple[str, T]]) -> dict[str, list[T]]:
    hosts: dict[str, list[T]] = {}
    for host, value in values:
        hosts.setdefault(host, []).append(value)
    return hosts


def launcher() -> str:
    """Returns what goes before a command to start it as this one was; nothing for a single process."""
    if _run is None:
        return ""
    one_host = _run.world_size == _run.local_world_size
    return (
        f"torchrun {f'--standalone --nproc-per-node {_run.world_size}' if one_host else '...'} --no-python "
    )


def continue_with(command: str) -> None:
    """From now on, processes that end because another one has ended say that this command continues."""
    if _run is not None:
        _run.how_to_continue = command


@contextmanager
def together() -> Iterator[None]:
    """Connects the processes that torchrun has started, and lets one of them say why they end.

    If a process ends with an error, is killed or is interrupted, all end. The first to know prints the reason
    and the others nothing.

    Raises:
        UserError: this process has an error, or another one has ended without a word, or another launcher
            than torchrun has started several.
        SystemExit: another process has said why.
    """
    _join()
    try:
        yield
    except BaseException as error:
        if _run is None:
            raise
        interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        if not _run.is_to_speak():
            raise SystemExit(130 if interrupted else 1) from None
        if _is_of_connection(error):
            raise UserError(f"another process of this run has ended, so all end.{_hint()}") from None
        if not isinstance(error, UserError | Interrupted | KeyboardInterrupt):
            traceback.print_exc()
            raise SystemExit(1) from None
        raise


@dataclass
class _Run:
    """This process among several.

    Attributes:
        store: of the launcher, which outlives the processes.
        how_to_continue: the command, if there is something to continue.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store: Any
    how_to_continue: str | None = None
    speaks: bool = False

    def is_to_speak(self) -> bool:
        """Returns whether this is the process that says why all end: the first that asks."""
        if not self.speaks:
            try:
                self.speaks = self.store.add("ktops/speaks", 1) == 1
            except RuntimeError:  # the launcher is gone
                self.speaks = True
        return self.speaks


_run: _Run | None = None


def _join() -> None:
    """Connects this process with the others, if torchrun has started several."""
    global _run
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if _run is not None:
        return
    if any(name not in os.environ for name in names):
        _require_no_other_launcher()
        return
    own, size, own_here, size_here = (int(os.environ[name]) for name in names)
    if size == 1:
        for name in names:  # by which transformers and accelerate would tell several processes
            del os.environ[name]
        return
    import torch

    if not torch.distributed.is_available():
        raise UserError("this PyTorch is built without torch.distributed, which several processes need")
    torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _run = _Run(own, size, own_here, size_here, torch.distributed.PrefixStore(f"ktops/{attempt}", store))
    _watch_sigterm()


def _require_no_other_launcher() -> None:
    """Raises UserError for variables by which accelerate would take this process for one of several."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if os.environ.get(name, "1") != "1":
            raise UserError(
                f"several processes must be started by torchrun, got {name}={os.environ[name]} without "
                "torchrun's LOCAL_RANK and LOCAL_WORLD_SIZE. docs/scale.md has the command; for one process, "
                f"unset {name}"
            )


def _watch_sigterm() -> None:
    """Ends this process at SIGTERM, which torchrun sends when another one has ended.

    A handler of Python's would not run while the main thread waits for another process, so a thread does.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.signal(signal.SIGTERM, lambda signum, frame: None)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)

    def watch() -> None:
        while signal.SIGTERM not in os.read(told, 64):
            pass
        assert _run is not None
        if _run.speaks:
            time.sleep(_GRACE)
        elif _run.is_to_speak():
            reason = "stopped by SIGTERM, which torchrun sends to all processes when one has ended"
            print(f"ktops: {reason}.{_hint()}", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="ktops SIGTERM", daemon=True).start()


def _hint() -> str:
    if _run is None or _run.how_to_continue is None:
        return ""
    return f" To continue:\n  {_run.how_to_continue}"


def _is_of_connection(error: BaseException) -> bool:
    """Returns whether an error says that a process with which this one was exchanging tensors is gone."""
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)
