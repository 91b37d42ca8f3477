"""The plugin file for ms-swift, imported as ms-swift does: by its path."""

import runpy
import subprocess
import sys

import pytest
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.trainer_callback import CallbackHandler

import ktops
from ktops.integrations import training


@pytest.fixture
def disabled():
    ktops.disable()
    yield
    training.disable()
    ktops.disable()


def test_the_printed_file_registers_ktops(disabled):
    own = CallbackHandler.on_train_begin
    assert "ktops" not in ALL_EXPERTS_FUNCTIONS
    command = [sys.executable, "-m", "ktops.integrations.swift"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    runpy.run_path(path)
    assert "ktops" in ALL_EXPERTS_FUNCTIONS
    assert CallbackHandler.on_train_begin is not own
