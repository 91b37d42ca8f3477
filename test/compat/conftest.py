"""Makes tiny checkpoints and models of other folders, and kt_kernel, importable."""

import sys
from pathlib import Path

import pytest

from ktops import compat

for folder in ("checkpoints", "integrations"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))


@pytest.fixture
def installed():
    """``import kt_kernel`` works while a test runs."""
    compat.install()
    yield
    compat.uninstall()
