"""Results do not depend on nodes, in any bit; and which phases have homes."""

import pytest
import torch

import ktops
from ktops.testing.compare import random_grad_output, run, threads
from ktops.testing.inputs import moe_inputs
from ktops.testing.weights import in_format

SHARES = [[1, 1], [1, 1, 1], [3, 1]]
SIZES = {"T": 40, "H": 256, "I": 192, "E": 5, "K": 2, "lora_rank": 8}


@pytest.fixture(autouse=True)
def no_nodes():
    """Tasks have no home after a test."""
    yield
    torch.ops.kt.set_numa_nodes([], [])


def set_nodes(shares: list[int]) -> None:
    """Makes CPU i one of node i, modulo the number of nodes."""
    torch.ops.kt.set_numa_nodes([cpu % len(shares) for cpu in range(64)], shares)


def transposed(inputs: dict) -> dict:
    """Stores the weights as [E, in, out]."""
    weights = {name: inputs[name].mT.contiguous().mT for name in ("gate_up_proj", "down_proj")}
    return inputs | weights


def bf16(**options) -> dict:
    return moe_inputs(**SIZES | {"dtype": torch.bfloat16} | options)


CASES = {
    "bfloat16": (bf16, {}),
    "bfloat16, one token": (lambda: bf16(T=1), {}),
    "bfloat16, many tokens": (lambda: bf16(T=4200, H=1024, I=32, E=2, lora_rank=0), {}),
    "bfloat16, recompute": (bf16, {"save": "recompute"}),
    "bfloat16, transposed": (lambda: transposed(bf16()), {}),
    "bfloat16, interleaved": (lambda: bf16(gating="interleaved") | {"gating": "interleaved"}, {}),
    "float32": (lambda: bf16(dtype=torch.float32), {}),
    "int4": (lambda: in_format(bf16(), "int4", 32), {}),
    "int4 in integers": (lambda: in_format(bf16(), "int4", 32), {"compute": "int8"}),
    "fp8": (lambda: in_format(bf16(), "fp8_e4m3", 128), {}),
    "q4_k": (lambda: in_format(bf16(I=256), "q4_k", 0), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_one_node(isa, case):
    make, options = CASES[case]
    inputs = make()
    grad_output = random_grad_output(inputs)
    names = tuple(name for name in ("hidden_states", "topk_weights") if name in inputs)
    names += tuple(name for name in inputs if "lora" in name)
    with threads(1):
        expected = run(inputs, grad_output, names, **options)
    for shares in SHARES:
        set_nodes(shares)
        for count in (1, 2, 3):
            with threads(count), ktops.profile() as profile:
                actual = run(inputs, grad_output, names, **options)
            assert profile.at_home is not None
            for name, value in expected.items():
                assert torch.equal(actual[name], value), (shares, count, name)


def with_homes(inputs: dict, **options) -> set[str]:
    set_nodes([1, 1])
    with ktops.profile() as profile:
        run(inputs, random_grad_output(inputs), ("hidden_states",), **options)
    steps = [step for step in profile.steps if step.at_home + step.stolen]
    assert all(step.at_home + step.stolen == step.tasks for step in steps)
    return {step.name for step in steps}


def test_tasks_that_read_whole_rows_have_homes():
    assert with_homes(bf16()) == {"gate_up", "down"}
    assert with_homes(bf16(), save="recompute") == {"gate_up", "down", "recompute"}
    assert with_homes(transposed(bf16())) == {"activate", "combine_x"}


def test_one_thread_finds_the_tasks_of_its_node(isa):
    """It runs them all at home, and steals the rest: a CPU that no node has is on the first."""
    inputs = bf16(lora_rank=0)
    torch.ops.kt.set_numa_nodes([], [1, 1])
    with threads(1), ktops.profile() as profile:
        ktops.moe_sft(**inputs)
    for step in profile.steps:
        if step.name in ("gate_up", "down"):
            assert step.at_home == step.stolen == step.tasks // 2
    assert profile.at_home == 0.5
    table = str(profile).splitlines()
    assert "at home" in table[0] and "stolen" in table[0]


def test_without_nodes_no_task_has_a_home():
    inputs = bf16()
    torch.ops.kt.set_numa_nodes([0, 0], [1])
    with ktops.profile() as profile:
        ktops.moe_sft(**inputs)
    assert profile.at_home is None and "at home" not in str(profile)
    assert torch.ops.kt.numa_rows(768) == []


def test_parts_of_rows():
    set_nodes([3, 2, 1])
    assert torch.ops.kt.numa_rows(768) == [0, 384, 640, 768]
    assert torch.ops.kt.numa_rows(7) == [0, 3, 5, 7]
    assert torch.ops.kt.numa_rows(0) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 2], [1, 1]), r"node_of_cpu must be in \[0, 2\), got 2"),
        (([0], [1, 0]), r"shares must be in \[1, 2\^20\], got 0"),
        (([0], [1] * 33), "shares must have at most 32 elements, got 33"),
    ],
)
def test_errors_change_nothing(arguments, message):
    set_nodes([1, 1])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kt.set_numa_nodes(*arguments)
    assert torch.ops.kt.numa_rows(4) == [0, 2, 4]
