"""Fixtures shared by several folders."""

import gc
import os
import signal
import sys

import pytest

# Read when torch is first imported. Threads that spin while they wait take the cores of other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Background jobs of a shell script ignore SIGINT, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish():
    """Keeps the garbage collector from looking again and again at what the imported libraries consist of."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def single_thread(monkeypatch):
    """Uses one thread, also in child processes; tiny models would wait for threads longer than they work."""
    from ktops.testing.compare import one_thread

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with one_thread():
        yield


@pytest.fixture
def enabled():
    """Enables ktops in transformers and PEFT while a test runs."""
    import ktops

    ktops.enable()
    yield
    ktops.disable()


@pytest.fixture
def ktops_command(monkeypatch, capfd, tmp_path):
    """``run(*arguments) -> (exit status, stdout, stderr)`` runs the command in this process, in tmp_path."""
    from ktops.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ktops", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main.main()
        out, err = capfd.readouterr()
        return stop.value.code or 0, out, err

    return run
