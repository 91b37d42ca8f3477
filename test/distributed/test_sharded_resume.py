"""Checkpoints of several processes: written as one process writes them, resumed bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cells import OPERATIONS
from ranks import run_ranks
from safetensors.torch import load_file

from ktops.testing.budgets import model_budget, relative_error

BUDGET = model_budget(torch.float32, 32, OPERATIONS)
CELL = "ep2_all_to_all-lora-int4"


@pytest.fixture(scope="module")
def run(saved_model, tmp_path_factory):
    """A run with the experts divided between two processes: the model, its directory, and its results."""
    model, output = saved_model("qwen3_moe"), tmp_path_factory.mktemp("run")
    run_ranks("resume_program.py", 2, model, output, CELL)
    return model, output, torch.load(output / "result.pt")


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """The same run in one process."""
    model, _, _ = run
    output = tmp_path_factory.mktemp("alone")
    run_ranks("resume_program.py", 0, model, output, CELL)
    return output, torch.load(output / "result.pt")


def test_resumed_bit_for_bit(run):
    _, _, results = run
    assert results["resumed"]["losses"] == results["straight"]["losses"]
    for name, parameter in results["straight"]["parameters"].items():
        assert torch.equal(results["resumed"]["parameters"][name], parameter), name


def test_file_of_one_process(run, alone):
    """The same keys, shapes, dtypes and configuration, and the values within rounding."""
    _, output, _ = run
    other, _ = alone
    for step in ("checkpoint-3", "checkpoint-5"):
        adapters = [load_file(path / step / "adapter_model.safetensors") for path in (output, other)]
        assert list(adapters[0]) == list(adapters[1])
        for name, expected in adapters[1].items():
            assert adapters[0][name].dtype == expected.dtype
            assert relative_error(adapters[0][name], expected) <= BUDGET, name
        assert _config(output / step) == _config(other / step)


def _config(path: Path) -> dict:
    """Returns a configuration without auto_mapping, in which PEFT names the class that FSDP2 has made."""
    config = json.loads((path / "adapter_config.json").read_text())
    del config["auto_mapping"]
    return {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}


def test_plain_peft_loads_it(run):
    """Without ktops, which a fresh process has never enabled; every tensor of the file arrives."""
    model, output, results = run
    code = (
        "import sys, torch; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2])\n"
        "assert 'ktops' not in sys.modules\n"
        "torch.save({n: p for n, p in model.named_parameters() if 'lora_' in n}, sys.argv[3])\n"
    )
    saved = output / "loaded.pt"
    subprocess.run([sys.executable, "-c", code, model, output / "checkpoint-5", saved], check=True)
    loaded = torch.load(saved)
    assert loaded.keys() == results["straight"]["parameters"].keys()
    for name, parameter in results["straight"]["parameters"].items():
        assert torch.equal(loaded[name], parameter), name


def test_another_number_of_processes_resumes(run, alone, tmp_path):
    """One process from the checkpoint of two, and two from that of one, end like one from the beginning."""
    model, output, _ = run
    other, expected = alone
    for world_size, checkpoint in ((0, output), (2, other)):
        run_ranks("resume_program.py", world_size, model, tmp_path, CELL, checkpoint / "checkpoint-3")
        resumed = torch.load(tmp_path / "result.pt")["resumed"]
        for name, parameter in expected["straight"]["parameters"].items():
            assert relative_error(resumed["parameters"][name], parameter) <= BUDGET, name
