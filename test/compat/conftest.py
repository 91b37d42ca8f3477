"""Makes the writers of tiny checkpoints in test/checkpoints, and kt_kernel, importable."""

import sys
from pathlib import Path

import pytest

from ktops import compat

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))


@pytest.fixture
def installed():
    """``import kt_kernel`` works while a test runs."""
    compat.install()
    yield
    compat.uninstall()
