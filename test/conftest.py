"""Fixtures of several folders."""

import pytest


@pytest.fixture
def single_thread(monkeypatch):
    """Here and in processes started from here: tiny models wait for threads longer than they work."""
    from ktops.testing.compare import one_thread

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with one_thread():
        yield
