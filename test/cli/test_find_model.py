"""Names of models: directories, and models in the cache of the Hugging Face Hub."""

import pytest
from huggingface_hub import constants

from ktops.cli.models import find_model


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The directory of the model org/name in a cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_directories_come_before_the_cache(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model("org/name") == str(cached)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_model("org/name") == str(tmp_path / "org" / "name")


@pytest.mark.parametrize("name", ["org/other", "no/such/directory", "a b"])
def test_other_names_are_paths(cached, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_model(name) == str(tmp_path / name)
