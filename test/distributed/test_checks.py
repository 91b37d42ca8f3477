"""Experts that two processes divide: uneven tokens, generation, checkpointing, adapters, errors."""

import pytest
from checks_program import CHECKS
from ranks import once, run_ranks


@pytest.fixture(scope="module")
def errors(saved_model, shared_folder):
    output = shared_folder / "checks"
    once(output, lambda: run_ranks("checks_program.py", 2, saved_model("qwen3_moe"), output))
    return output


@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(errors, name):
    error = (errors / name).read_text()
    assert not error, error
