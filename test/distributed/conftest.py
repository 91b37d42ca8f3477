"""Models and adapters for tests with several processes."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "integrations"))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder of all workers of pytest-xdist, for results that one of them computes."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """``saved(architecture)`` -> the directory of a tiny model with the adapters "frozen" and "lora"."""
    from cells import save_adapters, tiny_model_for_ranks

    made: dict[str, Path] = {}

    def saved(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            tiny_model_for_ranks(architecture).save_pretrained(made[architecture])
            save_adapters(made[architecture])
        return made[architecture]

    return saved
