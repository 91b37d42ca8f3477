"""What ``simulated`` holds runs in a process of its own, started by test_simulated.py."""

import os

import pytest

from ktops.testing import fake_cuda

collect_ignore = [] if os.environ.get("KTOPS_SIMULATED") else ["simulated"]


@pytest.fixture
def cuda():
    """The library with the functions of CUDA, for tensors on the CPU."""
    with fake_cuda.installed() as cuda:
        yield cuda


@pytest.fixture
def stream(cuda) -> fake_cuda.Stream:
    return cuda.stream()
