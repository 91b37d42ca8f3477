"""ktops.profile: which steps ran and how often; ``test/test_schedule.py`` tests times with a fake clock."""

import os
import subprocess
import sys

import pytest
import torch

import ktops
from ktops.testing.compare import random_grad_output, run
from ktops.testing.inputs import moe_inputs


@pytest.fixture
def inputs():
    return moe_inputs(T=200, H=96, I=80, E=6, K=2, dtype=torch.bfloat16, lora_rank=4)


def steps_of(op: str, profile: ktops.Profile) -> list[ktops.Step]:
    return [step for step in profile.steps if step.op == op]


def test_steps_of_forward_and_backward(isa, inputs):
    with ktops.profile() as profile:
        run(inputs, random_grad_output(inputs))
        run(inputs, random_grad_output(inputs))
    forward = [step.name for step in steps_of("moe_sft_fwd", profile)]
    assert forward[:2] == ["arguments", "prepare"] and forward[-2:] == ["launch", "finish"]
    assert len(forward) > 4 and len(steps_of("moe_sft_bwd", profile)) > len(forward)
    assert all(step.calls == 2 and step.tasks >= 2 for step in profile.steps)
    assert len({(step.op, step.name) for step in profile.steps}) == len(profile.steps)


def test_off_again_and_nothing_recorded(inputs):
    with ktops.profile() as outer:
        with ktops.profile() as inner:
            ktops.moe_sft(**inputs)
        ktops.moe_sft(**inputs)
    recorded = torch.ops.kt.profiled_steps()
    ktops.moe_sft(**inputs)
    assert torch.ops.kt.profiled_steps() == recorded
    assert not torch.ops.kt.profiling()
    assert {step.calls for step in inner.steps} == {1} and {step.calls for step in outer.steps} == {2}


def test_a_call_that_fails_does_not_disturb_the_next(inputs):
    with ktops.profile() as profile:
        with pytest.raises(RuntimeError, match="down_proj"):
            ktops.moe_sft(**inputs | {"down_proj": inputs["down_proj"][:, 1:]})
        ktops.moe_sft(**inputs)
    calls = {step.name: step.calls for step in steps_of("moe_fwd", profile)}
    assert calls["finish"] == 2 and calls["gate_up"] == 1


def test_table(inputs):
    with ktops.profile() as profile:
        ktops.moe_sft(**inputs)
    lines = str(profile).splitlines()
    assert len(lines) == 1 + len(profile.steps)
    shares = [float(line.split()[5].rstrip("%")) for line in lines[1:]]
    assert abs(sum(shares) - 100) < 1


def test_paths(isa, inputs):
    """Steps that multiply by the base weights count one path per block of C."""
    run(inputs, random_grad_output(inputs))
    with ktops.profile() as profile:
        run(inputs, random_grad_output(inputs))
    with_paths = {step.name: step for step in profile.steps if step.paths}
    assert set(with_paths) == {"gate_up", "down", "activate", "combine_x"}
    assert all(sum(step.paths.values()) >= step.tasks for step in with_paths.values())
    (line,) = [line for line in str(profile).splitlines() if " down " in line]
    assert line.endswith(", ".join(f"{path} {blocks}" for path, blocks in with_paths["down"].paths.items()))


def test_environment(tmp_path):
    code = (
        "import ktops\n"
        "from ktops.testing.inputs import moe_inputs\n"
        "ktops.moe_sft(**moe_inputs(T=3, H=8, I=4, E=4, K=2))\n"
    )

    def stderr(value: str) -> str:
        env = os.environ | {"KTOPS_PROFILE": value}
        result = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stderr

    assert "gate_up" in stderr("1") and "gate_up" not in stderr("0")


def test_torch_profiler_sees_the_operators(inputs):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run(inputs, random_grad_output(inputs))
    assert {"kt::moe_sft_fwd", "kt::moe_sft_bwd"} <= {event.key for event in profiler.key_averages()}
