"""Calls on several streams with random delays in any order: no result is wrong, and nothing waits forever.

``test/streams.cpp`` does the same with several threads that enqueue, under ThreadSanitizer where it builds.
"""

import random
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from programs import ROOT, compiled
from stream_calls import arguments, expected
from torch import Tensor

import ktops
from ktops.devices import streams
from ktops.ops.arguments import MoeArguments
from ktops.testing.fake_cuda import FakeCuda, Stream

INTERLEAVINGS = 1000
LAYERS = 4
TOKENS = (1, 2, 5)


@cache
def layer(seed: int, num_tokens: int) -> tuple[MoeArguments, Tensor]:
    """Returns arguments and the output that belongs to them."""
    given = arguments(seed=seed, T=num_tokens, dtype=torch.bfloat16)
    return given, expected(given)


@dataclass
class Program:
    """What one stream computes: calls that all read the same memory of the device, and write to the same."""

    cuda: FakeCuda
    stream: Stream
    num_tokens: int
    open: list[tuple[streams.Pending, Tensor]] = field(default_factory=list)
    checks: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # results, and what they must be

    def __post_init__(self) -> None:
        self.inputs = [torch.empty_like(tensor) for tensor in layer(0, self.num_tokens)[0][:3]]

    def begin(self, seed: int) -> None:
        given, exact = layer(seed, self.num_tokens)
        with self.cuda.use(self.stream):
            for to, source in zip(self.inputs, given[:3], strict=True):
                self.cuda.copy(to, source)
            self.open.append((streams.begin(MoeArguments(*self.inputs, *given[3:])), exact))

    def end(self, number: int) -> None:
        call, exact = self.open.pop(number)
        result = torch.empty_like(exact)
        with self.cuda.use(self.stream):
            self.cuda.copy(result, call.result())
        self.checks.append((result, exact))


def interleave(cuda: FakeCuda, on: list[Stream], seed: int) -> list[Program]:
    """Enqueues a random program on every stream, their steps in random order."""
    choose = random.Random(seed)
    cuda.delays(seed, choose.choice([0, 20, 100]))
    cuda.functions.fake_serialize_host_functions(seed % 2)
    programs = [Program(cuda, stream, choose.choice(TOKENS)) for stream in on]
    for _ in range(12):
        program = choose.choice(programs)
        step = choose.random()
        if step < 0.5 or not program.open:
            program.begin(choose.randrange(LAYERS))
        elif step < 0.9:
            program.end(choose.randrange(len(program.open)))
        else:
            program.open.pop()
        if choose.random() < 0.02:
            ktops.empty_cache()
    for program in programs:
        while program.open:
            program.end(0)
    return programs


def test_random_interleavings(cuda, single_thread):
    on, compared, waits = [cuda.stream() for _ in range(6)], 0, cuda.calls("cudaStreamWaitEvent")
    for seed in range(INTERLEAVINGS):
        programs = interleave(cuda, on, seed)
        streams.synchronize()
        for result, exact in [check for program in programs for check in program.checks]:
            assert torch.equal(result, exact), f"seed {seed}"
            compared += 1
        cuda.kept.clear()
    assert compared > 3 * INTERLEAVINGS
    assert cuda.calls("cudaStreamWaitEvent") > waits + INTERLEAVINGS


def builds_with(flag: str, folder: Path) -> bool:
    """Returns whether the compiler builds programs with a flag that run here."""
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n")
    built = subprocess.run(["g++", flag, source, "-o", program], capture_output=True).returncode == 0
    return built and subprocess.run([program], capture_output=True).returncode == 0


def test_threads_that_enqueue_at_the_same_time(tmp_path):
    """Without ThreadSanitizer, only results and memory are checked."""
    names = ("runtime", "worker", "staging", "calls")
    fake = (ROOT / "ktops" / "testing" / "fake_cuda").glob("*.cpp")
    sources = [*(f"streams/{name}.cpp" for name in names), *map(str, sorted(fake))]
    sanitizer = [flag for flag in ("-fsanitize=thread",) if builds_with(flag, tmp_path)]
    program = compiled("streams", tmp_path, *sources, flags=["-rdynamic", *sanitizer])
    result = subprocess.run([program, str(INTERLEAVINGS // 2)], capture_output=True, text=True)
    assert result.returncode == 0, f"status {result.returncode}, see streams.cpp\n{result.stderr[-5000:]}"
    failed = "kt::moe_fwd: an earlier call failed on the CPU, and its result is NaN: no memory\n"
    assert (result.stdout, result.stderr) == (failed, "")
