"""Ctrl-C saves a checkpoint; --resume gives the result of an uninterrupted run."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from ktops.cli.finetune import options as options_file

STEPS = 30


def options(model_directory, data_file) -> list[object]:
    return [
        "--model", model_directory, "--data", data_file, "--max-length", 96, "--lora-rank", 4,
        "--learning-rate", 0.01, "--max-steps", STEPS, "--save-steps", 1000, "--batch-size", 4,
    ]  # fmt: skip


def losses(directory) -> list[float]:
    metrics = json.loads((directory / "metrics.json").read_text())
    return [entry["loss"] for entry in metrics["steps"]]


def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    ktops_command, interrupted_command, reload_here, model_directory, data_file, tmp_path
):
    arguments = options(model_directory, data_file)
    shown = STEPS // 10
    status, out, err = interrupted_command(shown, "finetune", *arguments, "--output-dir", "stopped")
    assert status == 130, err
    assert f"step {shown}/{STEPS}" in out and "saving a checkpoint" in out
    assert "ktops finetune --resume --output-dir stopped" in err and "Traceback" not in err
    (checkpoint,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    assert checkpoint.name == f"checkpoint-{shown + 1}"
    assert not (tmp_path / "stopped" / "metrics.json").exists()

    status, out, err = ktops_command("finetune", "--resume", "--output-dir", "stopped")
    assert (status, err) == (0, "")
    assert f"continuing from stopped/checkpoints/{checkpoint.name}" in out
    assert ktops_command("finetune", *arguments, "--output-dir", "whole")[0] == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    stopped, whole = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stopped", "whole")
    )
    assert all(torch.equal(stopped[name], tensor) for name, tensor in whole.items())

    status, _, err = ktops_command("finetune", "--resume", "--output-dir", "stopped")
    assert (status, err) == (
        1,
        "ktops: --resume: the run in stopped is complete after "
        f"{STEPS} steps. To continue it, increase --max-steps\n",
    )
    assert ktops_command("finetune", "--resume", "--output-dir", "stopped", "--max-steps", STEPS + 2)[0] == 0
    assert len(losses(tmp_path / "stopped")) == STEPS + 2


def test_resumed_pretraining_equals_an_uninterrupted_one(
    ktops_command, interrupted_command, reload_here, tmp_path
):
    arguments = ("--pretrain-steps", 4, "--max-steps", 1)
    status, _, err = interrupted_command(1, "finetune", *arguments)
    assert status == 130 and "--resume" in err
    assert ktops_command("finetune", "--resume")[0] == 0
    assert ktops_command("finetune", *arguments, "--output-dir", "whole")[0] == 0
    resumed, whole = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("ktops-finetune", "whole")
    )
    assert [entry["step"] for entry in resumed["pretraining"]["steps"]] == [1, 2, 3, 4]
    for of in (resumed, whole):
        of["losses"] = [entry["loss"] for entry in of["pretraining"]["steps"] + of["steps"]]
    assert resumed["losses"] == whole["losses"]
    assert not (tmp_path / "ktops-finetune" / "pretraining").exists()


def test_pretraining_needs_as_many_processes(ktops_command, tmp_path):
    """Its batch is divided among them, so another number would see other batches."""
    checkpoint = tmp_path / "run" / "pretraining" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    options = options_file.complete(options_file.Options())
    options_file.save(dataclasses.replace(options, world_size=2), tmp_path / "run")
    status, _, err = ktops_command("finetune", "--resume", "--output-dir", "run")
    assert (status, err) == (
        1,
        "ktops: --resume: the small model is being pretrained with batches for 2 processes, not for 1. "
        "Continue with 2; after its pretraining, others can take over\n",
    )


@pytest.mark.parametrize("name", ["metrics.json", "adapter_config.json"])
def test_killed_after_the_last_step(ktops_command, reload_here, model_directory, data_file, tmp_path, name):
    """With a constant learning rate, which another step would show."""
    arguments = [*options(model_directory, data_file), "--lr-scheduler", "constant", "--output-dir", "run"]
    arguments[arguments.index(STEPS)] = 4
    arguments[arguments.index(1000)] = 2
    assert ktops_command("finetune", *arguments)[0] == 0
    run = tmp_path / "run"
    before = losses(run), load_file(run / "adapter_model.safetensors")
    for file in {"metrics.json", name}:
        (run / file).unlink()
    status, out, err = ktops_command("finetune", "--resume", "--output-dir", "run")
    assert (status, err) == (0, "") and "no steps left to train" in out
    after = losses(run), load_file(run / "adapter_model.safetensors")
    assert after[0] == before[0] and len(after[0]) == 4
    assert all(torch.equal(after[1][key], tensor) for key, tensor in before[1].items())


def test_damaged_options(ktops_command, tmp_path):
    (tmp_path / "run" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "options.json").write_text("{")
    status, _, err = ktops_command("finetune", "--resume", "--output-dir", "run")
    assert status == 1 and err.startswith("ktops: --resume: ") and "options.json is not JSON" in err


def test_resume_takes_no_other_options(ktops_command, model_directory, data_file, tmp_path):
    (tmp_path / "run").mkdir()
    options_file.save(
        options_file.complete(options_file.Options(model=str(model_directory), data=str(data_file))),
        tmp_path / "run",
    )
    status, _, err = ktops_command("finetune", "--resume", "--output-dir", "run", "--lora-rank", 8)
    assert (status, err) == (
        1,
        "ktops: --resume: --lora-rank is 16 in the run to resume and can't be changed to 8. "
        "Leave it out, or start another run\n",
    )
    status, _, err = ktops_command("finetune", "--resume", "--output-dir", "run", "--ignore-keys", "id")
    assert status == 1
    assert "--ignore-keys is not given in the run to resume and can't be changed to id. " in err
