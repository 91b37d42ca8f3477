"""`ktops finetune` in several processes: the result of one, and one voice."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from forked_ranks import started
from model_files import save_model
from safetensors.torch import load_file

from ktops._display import format_bytes
from ktops.cli import processes
from ktops.cli.errors import UserError
from ktops.cli.finetune import demo_model, interrupt, lora, pretrain, progress, run, training, verify
from ktops.cli.finetune import options as options_file

COMMON = [
    "finetune", "--max-length", 96, "--lora-rank", 4, "--dtype", "f32", "--seed", 3, "--optimizer", "sgd",
    "--learning-rate", 0.5, "--lr-scheduler", "constant", "--warmup-ratio", 0,
]  # fmt: skip


def short() -> None:
    """Leaves out what takes seconds and is tested elsewhere: a fresh process, long answers, many stories."""
    run.NEW_TOKENS = 4
    demo_model.NUM_STORIES = 200
    verify.run = lambda path: verify.check(verify.Record(**json.loads(path.read_text())))


@pytest.fixture
def arguments(model_directory, data_file):
    return [*COMMON, "--model", model_directory, "--data", data_file]


def results(directory) -> tuple[dict, dict[str, torch.Tensor]]:
    metrics = json.loads((directory / "metrics.json").read_text())
    return metrics, load_file(directory / "adapter_model.safetensors")


def assert_same_training(found, expected, rounding: float) -> None:
    """Of runs in float32 with SGD, whose updates are as exact as the gradients."""
    (metrics, adapter), (expected_metrics, expected_adapter) = found, expected
    for step, other in zip(metrics["steps"], expected_metrics["steps"], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=rounding)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * rounding)
        assert (step["step"], step["tokens"]) == (other["step"], other["tokens"])
    for when, losses in metrics["held_out"].items():
        assert losses == pytest.approx(expected_metrics["held_out"][when], rel=10 * rounding)
    assert adapter.keys() == expected_adapter.keys()
    for name, tensor in adapter.items():
        error = (tensor - expected_adapter[name]).norm() / expected_adapter[name].norm()
        assert error < 10 * rounding, name


def patch_progress(rank: int, step: int, number: int) -> None:
    """Makes a process send itself a signal after it has logged a step."""
    show = progress.ProgressCallback.on_log

    def on_log(self, args, state, control, **kwargs):
        show(self, args, state, control, **kwargs)
        if (args.process_index, state.global_step) == (rank, step):
            os.kill(os.getpid(), number)

    progress.ProgressCallback.on_log = on_log


def short_with_signal(rank: int, step: int, number: int) -> None:
    short()
    patch_progress(rank, step, number)


def test_result_of_one_process(arguments, ktops_command, reload_here, tmp_path):
    """Over the end of an epoch: 21 examples are 11 batches, so the third process gets none in the last turn.

    The first 5 of 9 steps run in three processes. All that follow, then also in one, give the same result.
    """
    options = [*arguments, "--batch-size", 2, "--eval-examples", 3]
    assert (
        ktops_command(*options, "--max-steps", 9, "--gradient-accumulation-steps", 3, "--output-dir", "one")[
            0
        ]
        == 0
    )
    with started(3, [*options, "--max-steps", 5, "--output-dir", "three"], tmp_path, short) as ranks:
        statuses, printed = ranks.wait()
    assert (statuses, printed[1:]) == ([0, 0, 0], ["", ""])
    shutil.copytree(tmp_path / "three", tmp_path / "resumed")
    resume = ["finetune", "--resume", "--max-steps", 9, "--output-dir"]
    with started(3, [*resume, "three"], tmp_path, short) as ranks:
        statuses, printed = ranks.wait()
    assert (statuses, printed[1:]) == ([0, 0, 0], ["", ""])
    status, out, err = ktops_command(*resume, "resumed")
    assert (status, err) == (0, "")
    assert "1 process instead of 3: each takes 3 batches of 2 in a step" in out
    expected = results(tmp_path / "one")
    for name, count in (("three", 3), ("resumed", 1)):
        found = results(tmp_path / name)
        assert_same_training(found, expected, 1e-5)
        assert found[0]["world_size"] == len(found[0]["processes"]) == count
        assert "world_size" not in found[0]["options"]


def test_other_processes_that_cannot_share_a_step(ktops_command, tmp_path):
    (tmp_path / "run").mkdir()
    options = options_file.complete(options_file.Options(model="m", data="d"))
    options_file.save(dataclasses.replace(options, world_size=3), tmp_path / "run")
    with started(2, ["finetune", "--resume", "--output-dir", "run"], tmp_path) as ranks:
        statuses, printed = ranks.wait()
    assert statuses == [1, 1]
    assert "".join(printed) == (
        "ktops: --resume: a step of this run has 3 batches (3 processes, --gradient-accumulation-steps 1), "
        "which 2 processes cannot share equally. Use a number of processes that divides 3\n"
    )


def test_accelerators_are_for_one_process(arguments, tmp_path):
    with started(2, [*arguments, "--device", "cuda"], tmp_path) as ranks:
        statuses, printed = ranks.wait()
    assert statuses == [1, 1]
    assert "".join(printed) == (
        "ktops: --device cuda: several processes train on the CPU only. Start one process\n"
    )


def test_killed_and_interrupted(arguments, tmp_path):
    """One process is killed, then another one interrupted: all end, with one message, and can continue."""
    options = [*arguments, "--batch-size", 2, "--max-steps", 14, "--save-steps", 4, "--lora-dropout", 0.3]
    with started(2, [*options, "--output-dir", "whole"], tmp_path, short) as ranks:
        assert ranks.wait()[0] == [0, 0]
    hook = functools.partial(short_with_signal, 1, 6, signal.SIGKILL)
    with started(2, [*options, "--output-dir", "run"], tmp_path, hook) as ranks:
        statuses, printed = ranks.wait()
    command = (
        "  torchrun --standalone --nproc-per-node 2 --no-python ktops finetune --resume --output-dir run\n"
    )
    assert (statuses, printed[1]) == ([1, -signal.SIGKILL], "")
    assert printed[0].endswith(
        "ktops: another process of this run has ended, so all end. To continue:\n" + command
    )
    hook = functools.partial(short_with_signal, 1, 9, signal.SIGINT)
    resume = ["finetune", "--resume", "--output-dir", "run"]
    with started(2, resume, tmp_path, hook) as ranks:
        statuses, printed = ranks.wait()
    assert statuses == [130, 130]
    assert "continuing from run/checkpoints/checkpoint-4" in printed[0]
    assert "".join(printed).count("Stopped after step 10 of 14. To continue:\n" + command) == 1
    with started(2, resume, tmp_path, short) as ranks:
        assert ranks.wait()[0] == [0, 0]
    (metrics, adapter), (whole_metrics, whole) = results(tmp_path / "run"), results(tmp_path / "whole")
    assert [step["loss"] for step in metrics["steps"]] == [step["loss"] for step in whole_metrics["steps"]]
    assert all(torch.equal(adapter[name], tensor) for name, tensor in whole.items())


def short_with_error(kind: type[BaseException]) -> None:
    """Raises an error in process 1 when it has loaded the model."""
    short()

    def fail(*arguments):
        raise kind("no adapters here")

    if os.environ["RANK"] == "1":
        lora.add_adapters = fail


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (UserError, 1, "ktops: no adapters here\n"),
        (ZeroDivisionError, 1, "ZeroDivisionError: no adapters here\n"),
        (KeyboardInterrupt, 130, "Interrupted.\n"),
    ],
)
def test_error_of_one_process(arguments, tmp_path, kind, status, message):
    with started(2, arguments, tmp_path, functools.partial(short_with_error, kind)) as ranks:
        statuses, printed = ranks.wait()
    assert statuses == [1, status]
    assert printed[1].endswith(message)
    assert printed[1].count("Traceback") == (kind is ZeroDivisionError) and "Traceback" not in printed[0]
    assert "another process" not in printed[0]
    assert not (tmp_path / "ktops-finetune").exists()


def test_sigterm_ends_a_process_that_waits_for_another(arguments, tmp_path):
    """The other one is stopped, not dead, so no connection is closed."""
    hook = functools.partial(short_with_signal, 1, 2, signal.SIGSTOP)
    with started(2, [*arguments, "--batch-size", 2, "--max-steps", 14], tmp_path, hook) as ranks:
        ranks.wait_for("step 2/14")
        time.sleep(1)
        assert "step 4/14" not in ranks.printed()[0]
        ranks.signal(0, signal.SIGTERM)
        ranks.processes[0].join(60)
        assert ranks.processes[0].exitcode == 128 + signal.SIGTERM
        assert (
            "ktops: stopped by SIGTERM, which torchrun sends to all processes when one has ended. To continue"
            in (ranks.printed()[0])
        )


def in_two_steps() -> None:
    """Gives one process the batches of two: half as large, and two for a step."""
    short()
    make = training.training_arguments

    def arguments(options, directory, max_steps, **settings):
        return make(options, directory, max_steps, **{**settings, "gradient_accumulation_steps": 2})

    pretrain.BATCH_SIZE //= 2
    training.training_arguments = arguments


def test_pretraining_of_the_small_model(tmp_path):
    """All weights are trained, and the loss of the routers too."""
    options = ["finetune", "--pretrain-steps", 3, "--max-steps", 1, "--eval-fraction", 0]
    for count, hook in ((1, in_two_steps), (2, short)):
        with started(count, [*options, "--output-dir", f"on-{count}"], tmp_path, hook) as ranks:
            assert ranks.wait()[0] == [0] * count
    one, two = (json.loads((tmp_path / f"on-{count}" / "metrics.json").read_text()) for count in (1, 2))
    for step, other in zip(two["pretraining"]["steps"], one["pretraining"]["steps"], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert step["tokens"] == other["tokens"]


def short_with_memory(file: Path) -> None:
    """Each process writes down its memory that is mapped from a file, while all are in the second step."""
    short()
    step_end = interrupt.StopOnInterrupt.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 2:
            (memory,) = (found for found in psutil.Process().memory_maps() if found.path == str(file))
            Path(f"memory-{args.process_index}").write_text(json.dumps(memory._asdict()))
            processes.barrier()

    interrupt.StopOnInterrupt.on_step_end = on_step_end


def test_processes_share_the_pages_of_mapped_experts(tokenizer, data_file, tmp_path):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128}
    save_model(tmp_path / "model", tokenizer, **sizes)
    file = tmp_path / "model" / "model.safetensors"
    hook = functools.partial(short_with_memory, file)
    options = [*COMMON, "--model", tmp_path / "model", "--data", data_file, "--mmap"]
    with started(2, [*options, "--max-steps", 2], tmp_path, hook) as ranks:
        statuses, printed = ranks.wait()
    assert statuses == [0, 0]
    found = [json.loads((tmp_path / f"memory-{rank}").read_text()) for rank in range(2)]
    experts = 2 * 8 * 3 * 256 * 128 * 4
    assert all(memory["rss"] > 0.95 * experts for memory in found)
    assert sum(memory["pss"] for memory in found) < 1.05 * file.stat().st_size
    assert all(memory["anonymous"] == 0 for memory in found)
    size = format_bytes(file.stat().st_size)
    assert re.search(rf"plan: .* memory of 2 processes .*, {size} more mapped from files", printed[0])
