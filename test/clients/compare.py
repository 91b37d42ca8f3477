"""Runs clients as their users do, and compares a run through ktops with a plain one."""

import json
import os
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent


def run(*command: object, folder: Path, **environment: str) -> tuple[str, bool]:
    """Runs a client's command in a folder; returns (what it printed, whether kt operators ran in it).

    A command is looked up beside the running Python. Asserts that it succeeds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    witness = folder / "witness"
    witness.unlink(missing_ok=True)
    own = {"PYTHONPATH": str(HERE / "witness"), "KT_WITNESS": str(witness), "OMP_NUM_THREADS": "1"}
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **offline, **own, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout, witness.exists()


def losses(output: Path) -> list[float]:
    """Returns the losses that a trainer logged, from the state in its output directory or last checkpoint."""
    states = [
        *sorted(output.glob("checkpoint-*/trainer_state.json"), key=_step),
        *output.glob("trainer_state.json"),
    ]
    history = json.loads(states[-1].read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def _step(file: Path) -> int:
    return int(file.parent.name.rpartition("-")[2])


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")
