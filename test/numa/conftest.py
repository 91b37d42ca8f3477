import pytest
import torch

import ktops  # noqa: F401  (registers the operators)


@pytest.fixture(autouse=True)
def no_nodes():
    """Tasks have no home after a test."""
    yield
    torch.ops.kt.set_numa_nodes([], [])
