"""Runs clients as their users do, and compares a run through ktops with a plain one."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from ktops.testing.budgets import SAFETY, model_budget, relative_error, rms

HERE = Path(__file__).parent

DOCUMENT = (HERE.parents[1] / "docs" / "clients.md").read_text(encoding="utf-8")

EXAMPLES = dict(
    re.findall(r"^<!-- example: ([\w-]+) -->\n```\w*\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
)
"""Maps the name of each example in docs/clients.md to its text."""

MODEL = "Qwen/Qwen3-30B-A3B"
"""The model of the examples."""

TRAINING = {
    "learning_rate": 0.5,
    "logging_steps": 1,
    "max_steps": 3,
    "optim": "sgd",
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "save_steps": 1,
}
"""Arguments of transformers' trainer for runs that are compared."""

INNER_SIZE = 64
"""The longest sum in a tiny model."""

LAYER_OPERATIONS = 16
"""Operations of a tiny model's two layers, one after the other."""

SMALLEST_CHANGE = 1e-3
"""What training must change at least, relatively, for a comparison to mean something."""


def example(name: str, replacements: dict[str, str]) -> str:
    """Returns the text of an example with other names in place of the documented ones."""
    text = EXAMPLES[name]
    for documented, other in replacements.items():
        assert documented in text, f"the example {name} has no {documented}"
        text = text.replace(documented, other)
    return text


def environment_in(folder: Path) -> tuple[dict[str, str], Path]:
    """Makes a folder for a client's command.

    Returns:
        The environment of the command, and a file that exists after it if kt operators ran in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    witness = folder / "witness"
    witness.unlink(missing_ok=True)
    changes = {
        "PYTHONPATH": str(HERE / "witness"),
        "KT_WITNESS": str(witness),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "CUDA_VISIBLE_DEVICES": "",
        "DO_NOT_TRACK": "1",
    }
    return {**os.environ, **changes}, witness


def run(*command: object, folder: Path, succeeds: bool = True, typed: str = "") -> tuple[str, bool]:
    """Runs a client's command in a folder; returns (what it printed, whether kt operators ran in it).

    ``typed`` is its input.
    """
    environment, witness = environment_in(folder)
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        input=typed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (result.returncode == 0) == succeeds, result.stdout
    return result.stdout, witness.exists()


def checkpoints(output: Path) -> list[Path]:
    """Returns the checkpoints in the output directory of a trainer, or in that of its only run, in order."""
    found = [path.parent for path in output.rglob("checkpoint-*/trainer_state.json")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def losses(output: Path) -> torch.Tensor:
    """Returns the losses of all steps that a trainer logged."""
    history = json.loads((checkpoints(output)[-1] / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry])


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_training(actual: Path, plain: Path) -> None:
    """Asserts that two runs with ``optim=sgd`` and a checkpoint per step differ by rounding only.

    Their losses are as close as two computations of the gradients, and so are their adapters' updates.
    """
    expected = losses(plain)
    assert len(expected) == len(checkpoints(plain))
    assert relative_error(losses(actual), expected) <= _budget(plain)
    assert_same_updates(actual, plain)


def _budget(output: Path) -> float:
    """Returns how much the results of two runs may differ, relatively."""
    return model_budget(torch.float32, INNER_SIZE, len(checkpoints(output)) * LAYER_OPERATIONS)


def assert_same_updates(actual: Path, plain: Path) -> None:
    """Asserts that two runs write adapters with the same names, shapes and updates.

    An update is the change of a factor between the first checkpoint and the last; the factor is rounded each
    time that a step is added to it.
    """
    steps = len(checkpoints(plain))
    assert len(checkpoints(actual)) == steps >= 2
    (first, last), (plain_first, plain_last) = (
        [read_adapter(checkpoints(output)[index]) for index in (0, -1)] for output in (actual, plain)
    )
    assert last.keys() == plain_last.keys()
    assert any("experts" in name for name in last)
    for name, value in plain_last.items():
        update = value - plain_first[name]
        rounded = SAFETY * rms(value.dtype) * math.sqrt(2 * steps) * (value.norm() / update.norm()).item()
        error, budget = relative_error(last[name] - first[name], update), _budget(plain) + rounded
        assert error <= budget, f"{name}: {error:.1e} of the update, allowed {budget:.1e}"


def train(command: str, folder: Path, *, through_ktops: bool) -> Path:
    """Trains with a shell command in a folder; returns the folder named out in it."""
    _, ran = run("bash", "-c", command, folder=folder)
    assert ran == through_ktops
    return folder / "out"


def train_both(command: str, plain: str, folder: Path) -> tuple[Path, Path]:
    """Trains with a command that uses ktops and one that does not, each in a folder of its own."""
    ktops = train(command, folder / "ktops", through_ktops=True)
    return ktops, train(plain, folder / "plain", through_ktops=False)


def assert_loads_without_ktops(model: Path, adapter: Path, folder: Path) -> None:
    """Asserts that plain PEFT computes with an adapter what ktops does, disables and merges it.

    Writes to a new folder.
    """
    _, ran = run(sys.executable, HERE / "plain_peft.py", model, adapter, folder, folder=folder)
    assert not ran
    plain = load_file(folder / "logits.safetensors")
    budget = model_budget(torch.float32, INNER_SIZE, LAYER_OPERATIONS)
    assert relative_error(plain["adapted"], plain["base"]) > SMALLEST_CHANGE
    assert torch.equal(plain["disabled"], plain["base"])
    assert torch.equal(plain["reloaded"], plain["merged"])
    assert relative_error(plain["merged"], plain["adapted"]) <= budget
    _, ran = run(sys.executable, HERE / "plain_peft.py", model, adapter, folder, "ktops", folder=folder)
    assert ran
    assert relative_error(load_file(folder / "logits.safetensors")["adapted"], plain["adapted"]) <= budget
