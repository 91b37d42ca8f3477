"""Uses one thread for tiny checkpoints; the tiny models come from test/integrations."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "integrations"))


@pytest.fixture(autouse=True)
def tiny_checkpoints_in_one_thread(single_thread):
    pass
