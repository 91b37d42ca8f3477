"""Threads take the work of a call task by task, so a delayed thread delays only its current task.

Times on a busy machine show this only roughly (``python -m bench.busy_core``); here it is counted.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from programs import compiled

import ktops
from ktops.testing.compare import random_grad_output, run, threads
from ktops.testing.inputs import moe_inputs

SCHEDULER = (
    "core/environment.cpp",
    "parallel/profile.cpp",
    "parallel/nodes.cpp",
    "parallel/current_node.cpp",
)
PHASES, TASKS = 3, 100


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return compiled("schedule", tmp_path_factory.mktemp("schedule"), *SCHEDULER, "parallel/clock.cpp")


@pytest.mark.parametrize(("threads", "held"), [(1, 0), (2, 1), (3, 1), (3, 2), (7, 6)])
def test_threads_that_are_held_up_keep_one_task_each(program, threads, held):
    """Delayed threads wait in every phase until all other tasks are done; fixed shares would deadlock."""
    result = subprocess.run([program, str(threads), str(held)], capture_output=True, text=True)
    assert result.returncode == 0, f"status {result.returncode}, see schedule.cpp"
    phases = [list(map(int, line.split())) for line in result.stdout.splitlines()]
    assert len(phases) == PHASES
    for counts in phases:
        assert len(counts) == threads and sum(counts) == TASKS
        assert sum(count <= 1 for count in counts) >= held


def test_a_phase_too_many_is_an_error(program):
    """The error comes when the phase is added, not when it runs; earlier phases run."""
    result = subprocess.run([program], capture_output=True, text=True, check=True)
    assert result.stdout == "kt: more than kMaxPhases phases\n"


PRODUCTS = {
    "moe_sft_fwd": {"gate_up", "down"},
    "moe_sft_bwd": {"activate", "combine_x", "weights_h", "weights_i"},
}


@pytest.mark.parametrize("num_tokens", [1, 128])
def test_products_are_many_tasks_for_every_thread(num_tokens):
    """A fixed split of a product would have one task per thread."""
    with threads(2):
        inputs = moe_inputs(T=num_tokens, H=1024, I=512, E=16, K=2, dtype=torch.bfloat16, lora_rank=16)
        with ktops.profile() as profile:
            run(inputs, random_grad_output(inputs))
    for op, names in PRODUCTS.items():
        tasks = {step.name: step.tasks for step in profile.steps if step.op == op}
        assert all(tasks[name] >= 4 * 2 for name in names), tasks


@pytest.mark.parametrize("threads", [1, 3])
def test_every_moment_of_a_call_belongs_to_one_step(threads, tmp_path):
    program = compiled("profile", tmp_path, *SCHEDULER)
    *lines, ticks = subprocess.run(
        [program, str(threads)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    # name: (calls, tasks, busy, wait, wall), then at_home and stolen
    steps = {line.split()[1]: tuple(map(int, line.split()[2:7])) for line in lines}
    paths = {line.split()[1]: line.split()[9:] for line in lines}
    assert all(line.split()[7:9] == ["0", "0"] for line in lines)
    assert paths.pop("first") == ["a=7", "b=3"] and not any(paths.values())
    assert list(steps) == ["arguments", "prepare", "first", "second", "launch", "finish"]
    assert sum(wall for *_, wall in steps.values()) == int(ticks)
    assert steps["arguments"] == (1, 1, 101, 0, 101) and steps["prepare"] == (1, 1, 51, 0, 51)
    assert steps["finish"] == (1, 1, 71, 0, 71)
    assert all(busy + wait >= wall for _, _, busy, wait, wall in steps.values())
    in_threads = sum(busy + wait for name, (_, _, busy, wait, _) in steps.items() if name != "launch")
    assert in_threads <= threads * int(ticks)
    if threads == 1:
        assert steps["first"] == (1, 10, 10_001, 1, 10_002)
        assert steps["second"] == (1, 1, 1_001, 1, 1_002)
