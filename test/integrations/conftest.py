"""Uses one thread for tiny models; enables ktops in transformers and PEFT during a test."""

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
    """Enables ktops and clears what earlier tests compiled with torch.compile."""
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
