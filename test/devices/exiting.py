"""Child processes that exit with work pending on a stream. Argument: the library of ``fake_cuda``.

Prints a line for each: STAGE, WAY, the exit status, and as a literal what was written to stderr.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from stream_calls import arguments

import ktops
from ktops.devices import streams
from ktops.testing import fake_cuda
from ktops.testing.fake_cuda import FakeCuda, Stream

STATUS = 3
PATIENCE = 60
"""Seconds after which a process that does not exit is ended by a signal."""


kept: list = []
"""Keeps tensors, as the memory of a device outlives Python."""
ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def begin(**sizes: int) -> streams.Pending:
    given = arguments(**sizes)
    call = streams.begin(given)
    kept.extend((given, call.output))
    return call


def begun(cuda: FakeCuda, stream: Stream) -> None:
    """The copies to the CPU are not made."""
    cuda.block(stream)
    calls.append(begin())


def ended(cuda: FakeCuda, stream: Stream) -> None:
    """Everything is enqueued, nothing executed."""
    cuda.block(stream)
    begin().result()


def computing(cuda: FakeCuda, stream: Stream) -> None:
    """The worker computes; more calls wait for it."""
    for _ in range(20):
        begin(T=256, H=256, I=256).result()


def computed(cuda: FakeCuda, stream: Stream) -> None:
    """Nobody collects a result."""
    calls.append(begin())
    cuda.synchronize(stream)


def collected(cuda: FakeCuda, stream: Stream) -> None:
    """All is done, and its memory is held."""
    begin().result()
    cuda.synchronize(stream)


def captured(cuda: FakeCuda, stream: Stream) -> None:
    """A graph is being executed."""
    with cuda.capture(stream) as graph:
        begin(T=256, H=256, I=256).result()
    for _ in range(10):
        graph.launch(stream)


def other_thread(cuda: FakeCuda, stream: Stream) -> None:
    """A thread of Python begins calls until it is told not to. Python itself does not wait for it."""

    def work() -> None:
        try:
            with cuda.use(stream):
                while True:
                    begin().result()
                    started.set()
        except RuntimeError as error:
            assert str(error) == "kt::moe_fwd: Python is exiting"

    started = threading.Event()
    threads.append(threading.Thread(target=work, daemon=True))
    threads[0].start()
    started.wait()


def forked(cuda: FakeCuda, stream: Stream) -> None:
    """A child inherits a call, and neither CUDA nor the thread that computes."""
    cuda.block(stream)
    calls.append(begin())
    if not os.fork():
        calls.clear()
        ktops.empty_cache()
        assert ktops.memory_stats()["bytes_pinned"] == 0
        sys.exit(torch.ops.kt.moe_fwd(*arguments()).isnan().sum().item())
    _, status = os.wait()
    assert status == 0


calls: list = []
threads: list[threading.Thread] = []


@atexit.register  # before the hook of ktops, so that it runs after it
def join() -> None:
    """Waits for threads: Python ends one that is inside PyTorch with a crash, without ktops too."""
    for thread in threads:
        thread.join()


CASES = (
    *((stage, "drain") for stage in (begun, ended, computing, computed, collected, captured, other_thread)),
    *((stage, "leave") for stage in (computing, captured, forked)),
)
"""Stages, and whether CUDA, after Python is gone, executes all that is enqueued ("drain")."""


def child(stage: Callable[[FakeCuda, Stream], None], way: str) -> None:
    signal.alarm(PATIENCE)
    cuda = fake_cuda.install(Path(sys.argv[1]))
    cuda.kept = contextlib.nullcontext()  # kept above
    if way == "drain":
        cuda.functions.fake_drain_at_exit()
    stream = cuda.stream()
    with cuda.use(stream):
        stage(cuda, stream)
    sys.exit(STATUS)


def main() -> None:
    for stage, way in CASES:
        with tempfile.TemporaryFile("w+") as errors:
            process = os.fork()
            if not process:
                os.dup2(errors.fileno(), 2)
                child(stage, way)
            _, status = os.waitpid(process, 0)
            errors.seek(0)
            print(stage.__name__, way, os.waitstatus_to_exitcode(status), repr(errors.read()), flush=True)


if __name__ == "__main__":
    main()
