"""Uses one thread for tiny models, which come from other folders of test."""

import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1] / name) for name in ("", "integrations", "checkpoints")]


@pytest.fixture(autouse=True)
def tiny_models_in_one_thread(single_thread):
    pass
