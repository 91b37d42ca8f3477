"""ktops.memory_stats and ktops.empty_cache: scratch memory is reused, bounded, and returned."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import ktops
from ktops.testing.compare import random_grad_output, run
from ktops.testing.inputs import moe_inputs

SIZES = {"H": 96, "I": 80, "E": 6, "K": 2}


def inputs_of(num_tokens: int, **options) -> dict:
    return moe_inputs(T=num_tokens, **SIZES, dtype=torch.bfloat16, lora_rank=4, **options)


@pytest.fixture(autouse=True)
def empty():
    ktops.empty_cache()
    yield
    assert ktops.memory_stats()["bytes_in_use"] == 0
    ktops.empty_cache()


def train(num_tokens: int, save: str = "activations") -> None:
    inputs = inputs_of(num_tokens)
    run(inputs, random_grad_output(inputs), save=save)


def test_empty():
    train(20)
    before = ktops.memory_stats()
    assert before["bytes_idle"] > 0 and before["blocks"] > 0
    ktops.empty_cache()
    assert ktops.memory_stats() == {
        "bytes_in_use": 0,
        "bytes_idle": 0,
        "bytes_peak": 0,
        "blocks": 0,
        "allocations": before["allocations"],
        "bytes_pinned": 0,
    }


def test_steady_state_allocates_nothing(isa):
    lengths = (40, 300, 1)
    for num_tokens in lengths:
        train(num_tokens, save="recompute")
        ktops.moe_sft(**inputs_of(num_tokens))
    before = ktops.memory_stats()
    for num_tokens in lengths[::-1]:
        ktops.moe_sft(**inputs_of(num_tokens))
        train(num_tokens)
    assert ktops.memory_stats() == before


def test_growing_calls_keep_one_block():
    peaks = []
    for num_tokens in (10, 100, 1000):
        train(num_tokens)
        stats = ktops.memory_stats()
        assert stats["blocks"] == 1 and stats["bytes_idle"] == stats["bytes_peak"]
        peaks.append(stats["bytes_peak"])
    assert peaks == sorted(set(peaks))
    inputs = inputs_of(1000)
    routes, i = 1000 * SIZES["K"], SIZES["I"]
    assert stats["bytes_peak"] >= routes * 2 * i * inputs["hidden_states"].element_size()


def test_large_blocks_go_back_to_the_system():
    """20,000 tokens need more than 40 MB for [dg | du] alone; empty_cache() unmaps them."""

    def mapped() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    inputs = moe_inputs(T=20_000, H=8, I=512, E=2, K=1)
    grad_output = random_grad_output(inputs)
    run(inputs, grad_output, names=("hidden_states",))
    before, idle = mapped(), ktops.memory_stats()["bytes_idle"]
    ktops.empty_cache()
    assert idle > 40e6 and before - mapped() > 0.9 * idle


WINDOW = 512
"""The number of calls after which an unneeded block may be returned: kWindow in workspace.h."""

KEPT = 256 << 20
"""The bytes of idle blocks that are kept permanently: kKept in workspace.h."""


def tiny_calls(count: int) -> None:
    inputs = moe_inputs(T=1, H=16, I=16, E=2, K=1)
    with torch.inference_mode():
        for _ in range(count):
            ktops.moe_sft(**inputs)


def large_call() -> int:
    """Makes a call that needs more than KEPT, for [g | u] and h of 150,000 tokens; returns the idle bytes."""
    ktops.moe_sft(**moe_inputs(T=150_000, H=8, I=512, E=2, K=1))
    idle = ktops.memory_stats()["bytes_idle"]
    assert idle > KEPT
    return idle


def test_a_block_that_no_call_needs_any_more_goes_back():
    large = large_call()
    tiny_calls(WINDOW // 2)
    assert ktops.memory_stats()["bytes_idle"] == large
    tiny_calls(2 * WINDOW)
    stats = ktops.memory_stats()
    assert stats["bytes_idle"] <= KEPT and stats["bytes_peak"] == large
    tiny_calls(2 * WINDOW)
    assert ktops.memory_stats()["allocations"] - stats["allocations"] <= 1


def test_a_block_that_is_needed_once_in_a_while_stays():
    """This resembles the block of a backward pass between the forward passes of many layers."""
    large = large_call()
    allocations = ktops.memory_stats()["allocations"]
    for _ in range(4):
        tiny_calls(WINDOW - 1)
        assert large_call() == large
    assert ktops.memory_stats()["allocations"] == allocations


def test_a_usual_size_stays_however_seldom():
    ktops.moe_sft(**moe_inputs(T=20_000, H=8, I=512, E=2, K=1))
    before = ktops.memory_stats()
    assert 40e6 < before["bytes_idle"] <= KEPT
    tiny_calls(3 * WINDOW)
    assert ktops.memory_stats() == before


def test_sizes_of_many_kinds_stay_within_the_bound():
    """The limit applies to idle blocks of all sizes together, after an unusual call."""
    large_call()
    tiny_calls(2 * WINDOW)
    for num_tokens in range(40_000, 80_000, 5_000):
        ktops.moe_sft(**moe_inputs(T=num_tokens, H=8, I=512, E=2, K=1))
        stats = ktops.memory_stats()
        assert stats["bytes_in_use"] + stats["bytes_idle"] <= KEPT


def test_threads_share_the_blocks():
    """There are never more blocks than threads, and later rounds reuse them."""
    num_threads, errors = 4, []

    def work(barrier: threading.Barrier) -> None:
        try:
            torch.set_num_threads(1)
            for num_tokens in (30, 200, 3):
                inputs = inputs_of(num_tokens)
                barrier.wait()
                ktops.moe_sft(**inputs)
                stats = ktops.memory_stats()
                assert stats["bytes_in_use"] + stats["bytes_idle"] <= stats["bytes_peak"]
        except Exception as error:
            errors.append(error)
            barrier.abort()

    for _ in range(3):
        barrier = threading.Barrier(num_threads)
        threads = [threading.Thread(target=work, args=(barrier,)) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    stats = ktops.memory_stats()
    assert stats["bytes_in_use"] == 0 and stats["blocks"] <= num_threads


def test_wrong_arguments_take_nothing():
    inputs = inputs_of(20)
    before = ktops.memory_stats()
    for change in ({"activation": "elu"}, {"down_proj": inputs["down_proj"][:, 1:]}):
        with pytest.raises(RuntimeError):
            ktops.moe_sft(**inputs | change)
    assert ktops.memory_stats() == before


def python(code: str, tmp_path) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


OUT_OF_MEMORY = """
import resource, torch, ktops
from ktops.testing.inputs import moe_inputs
inputs = moe_inputs(T=50_000, H=8, I=512, E=2, K=1)
small = moe_inputs(T=3, H=8, I=512, E=2, K=1)
ktops.moe_sft(**small)
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20), hard))
try:
    ktops.moe_sft(**inputs)
except RuntimeError as error:
    print(error)
print(ktops.memory_stats()["bytes_in_use"], ktops.moe_sft(**small).isfinite().all().item())
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
print(ktops.moe_sft(**inputs).isfinite().all().item())
"""


def test_out_of_memory_leaves_nothing_in_use(tmp_path):
    *message, after, later = python(OUT_OF_MEMORY, tmp_path).splitlines()
    assert "out of memory" in " ".join(message) and "MiB" in " ".join(message)
    assert (after, later) == ("0 True", "True")


FORK = """
import os, threading, torch, ktops
from ktops.testing.inputs import moe_inputs
inputs = moe_inputs(T=400, H=64, I=64, E=6, K=2)
expected = ktops.moe_sft(**inputs)
stop = threading.Event()
def busy():
    while not stop.is_set():
        ktops.moe_sft(**inputs)
threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        ok = ktops.memory_stats()["bytes_in_use"] == 0
        ok = ok and torch.equal(ktops.moe_sft(**inputs), expected)
        ktops.empty_cache()
        ok = ok and ktops.memory_stats()["blocks"] == 0
        os._exit(0 if ok else 1)
    print(os.waitpid(child, 0)[1])
stop.set()
"""


def test_fork_while_other_threads_work(tmp_path):
    assert python(FORK, tmp_path).split() == ["0"] * 20


def test_stats_in_a_fresh_process(tmp_path):
    out = python("import ktops; print(list(ktops.memory_stats().values()))", tmp_path)
    assert out.strip() == "[0, 0, 0, 0, 0, 0]"
