"""What ``simulated`` holds runs in a process of its own, started by test_simulated.py."""

import gc
import os
import sys
from pathlib import Path

import pytest

from ktops.testing import fake_cuda

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "test/integrations")]

collect_ignore = [] if os.environ.get("KTOPS_SIMULATED") else ["simulated"]


@pytest.fixture
def cuda():
    """The library with the functions of CUDA, for tensors on the CPU. No garbage holds pinned memory."""
    gc.collect()
    with fake_cuda.installed() as cuda:
        yield cuda


@pytest.fixture
def stream(cuda) -> fake_cuda.Stream:
    return cuda.stream()
