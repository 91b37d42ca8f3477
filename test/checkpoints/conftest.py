"""One thread for tiny checkpoints."""

import pytest


@pytest.fixture(autouse=True)
def tiny_checkpoints_in_one_thread(single_thread):
    pass
