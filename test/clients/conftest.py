"""Keeps the tests of clients out of a run of all tests; run.py names their files, each in its environment."""

import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1] / name) for name in ("adapters", "integrations", "")]

collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ci: what continuous integration runs, by `run.py NAME -- -m ci`")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The folder of a tiny Qwen3-MoE."""
    from tiny import save_model

    return save_model(tmp_path_factory.mktemp("model"))
