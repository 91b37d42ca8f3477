"""Uses one thread for tiny models, which come from other folders of test."""

import sys
from pathlib import Path

import pytest

from ktops.cli import main

sys.path += [str(Path(__file__).parents[1] / name) for name in ("", "integrations", "checkpoints")]


@pytest.fixture(autouse=True)
def tiny_models_in_one_thread(single_thread):
    pass


@pytest.fixture
def ktops_main(monkeypatch, capfd, tmp_path):
    """``run(*arguments) -> (exit status, stdout, stderr)`` runs the command in this process, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ktops", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main.main()
        out, err = capfd.readouterr()
        return stop.value.code or 0, out, err

    return run
