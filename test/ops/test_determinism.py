"""Results depend only on the inputs, not on the number of threads or on concurrent calls."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import ktops
from ktops.testing.budgets import forward_budget, relative_error
from ktops.testing.compare import random_grad_output, run
from ktops.testing.inputs import moe_inputs, op_arguments

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


@pytest.fixture
def threads():
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cases(dtype: torch.dtype):
    """Each has work for at least seven threads, because small problems run on fewer."""
    yield moe_inputs(T=70, H=96, I=80, E=6, K=3, dtype=dtype, lora_rank=(5, 18), bias=True, routing="skewed")
    yield moe_inputs(T=1, H=640, I=256, E=8, K=4, dtype=dtype, lora_rank=4)
    yield moe_inputs(T=24, H=96, I=150, E=8, K=4, dtype=dtype, lora_rank=4)
    yield moe_inputs(
        T=120, H=33, I=130, E=2, K=2, dtype=dtype, lora_rank=1, routing="repeated", invalid_ids=True
    )


def assert_bitwise(actual: dict, expected: dict) -> None:
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("save", ["activations", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads(isa, threads, dtype, save):
    for inputs in cases(dtype):
        grad_output = random_grad_output(inputs)
        torch.set_num_threads(1)
        expected = run(inputs, grad_output, save=save)
        for num_threads in (1, 2, 3, 4, 7):
            torch.set_num_threads(num_threads)
            assert_bitwise(run(inputs, grad_output, save=save), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_with_any_number_of_threads(isa, threads, dtype):
    for inputs in cases(dtype):
        torch.set_num_threads(1)
        expected = torch.ops.kt.moe_fwd(*op_arguments(inputs))
        for num_threads in (2, 3, 7):
            torch.set_num_threads(num_threads)
            assert torch.equal(torch.ops.kt.moe_fwd(*op_arguments(inputs)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_calls(isa, dtype):
    for inputs in cases(dtype):
        grad_output = random_grad_output(inputs)
        expected = run(inputs, grad_output)
        for _ in range(3):
            assert_bitwise(run(inputs, grad_output), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_company(isa, dtype):
    """A token's row is the same alone and among others except for the order of a sum, because few and many
    rows of an expert may use different kernels.
    """
    inputs = moe_inputs(T=40, H=96, I=80, E=4, K=2, dtype=dtype, lora_rank=4, bias=True)
    together = ktops.moe_sft(**inputs)
    for t in (0, 7, 39):
        alone = {
            name: value[t : t + 1] if name in ("hidden_states", "topk_ids", "topk_weights") else value
            for name, value in inputs.items()
        }
        assert relative_error(ktops.moe_sft(**alone)[0], together[t]) <= forward_budget(dtype, inner_size=96)


def test_concurrent_calls_from_python_threads(isa):
    jobs = [
        moe_inputs(T=20 + 40 * i, H=64 + i, I=48, E=4, K=2, dtype=dtype, lora_rank=3, bias=True, seed=i)
        for i, dtype in enumerate(DTYPES * 3)
    ]
    grad_outputs = [random_grad_output(inputs) for inputs in jobs]
    expected = [run(inputs, grad) for inputs, grad in zip(jobs, grad_outputs, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            for actual, value in zip(pool.map(run, jobs, grad_outputs), expected, strict=True):
                assert_bitwise(actual, value)


def test_calls_inside_an_intra_op_region(isa, threads):
    """Autograd runs backward in its own threads, each with its own pool."""
    torch.set_num_threads(3)
    inputs = moe_inputs(T=60, H=80, I=48, E=4, K=2, dtype=torch.bfloat16, lora_rank=3)
    grad_output = random_grad_output(inputs)
    expected = run(inputs, grad_output)
    with ThreadPoolExecutor(1) as pool:
        assert_bitwise(pool.submit(run, inputs, grad_output).result(), expected)
