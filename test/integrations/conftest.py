"""One thread for tiny models; ktops enabled in transformers and PEFT for the time of a test."""

import pytest

import ktops


@pytest.fixture(autouse=True)
def tiny_models_in_one_thread(single_thread):
    pass


@pytest.fixture
def enabled():
    ktops.enable()
    yield
    ktops.disable()


@pytest.fixture
def compiling(enabled):
    """Enabled, and torch.compile without what earlier tests compiled."""
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
