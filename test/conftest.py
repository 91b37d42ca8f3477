"""Fixtures shared by several folders."""

import pytest


@pytest.fixture
def single_thread(monkeypatch):
    """Uses one thread, also in child processes; tiny models would wait for threads longer than they work."""
    from ktops.testing.compare import one_thread

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with one_thread():
        yield
