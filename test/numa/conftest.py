"""What tests of NUMA share: homes of tasks removed after each, and skips where the system forbids calls."""

import ctypes
import errno

import pytest
import torch

import ktops  # noqa: F401  (registers the operators)
from ktops.numa import system

FORBIDDEN = (errno.EPERM, errno.ENOSYS)


@pytest.fixture(autouse=True)
def no_nodes():
    """Removes the homes that the test has given to tasks; those from before are not restored."""
    yield
    torch.ops.kt.set_numa_nodes([], [])


def skip_if_forbidden(name: str, call) -> None:
    try:
        call()
    except OSError as error:
        if error.errno not in FORBIDDEN:
            raise
        pytest.skip(f"this system forbids {name} ({error.strerror})")


@pytest.fixture
def policies():
    """Skips the test where this process may not choose the node of its memory, as in most containers."""
    skip_if_forbidden("memory policies", lambda: system.set_policy(system.get_policy()))


@pytest.fixture
def movable():
    """Skips the test where this process may not ask for the node of pages, as in most containers."""
    pages = torch.tensor([ctypes.addressof(ctypes.c_char()) // 4096 * 4096])
    skip_if_forbidden("move_pages", lambda: system.move_pages(pages))
