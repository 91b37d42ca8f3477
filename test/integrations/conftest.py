"""Uses one thread for tiny models."""

import pytest


@pytest.fixture(autouse=True)
def tiny_models_in_one_thread(single_thread):
    pass


@pytest.fixture
def compiling(enabled):
    """Enables ktops and clears what earlier tests compiled with torch.compile."""
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
