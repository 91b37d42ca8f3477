"""run_on_gpu.py and its checks on machines without a GPU: those of streams on the fake CUDA runtime."""

import itertools
import json
import os
import re
import sys
from pathlib import Path

import gpu.every_check  # noqa: F401  (defines the checks)
import pytest
import run_on_gpu
import torch
from gpu.checks import CHECKS, Check, run_checks, tables
from gpu.runtime import Cuda, count_copies
from gpu_runtimes import InOrder

from ktops.devices import streams

HERE = Path(__file__).parent
FILES = [HERE / "run_on_gpu.py", *sorted(HERE.glob("gpu/*.py"))]


@pytest.fixture
def runtime(cuda, monkeypatch):
    monkeypatch.setattr(streams, "available", lambda kind: kind in streams.STREAMS)
    return InOrder(cuda)


def test_every_check_of_streams_passes(runtime, enabled, capsys):
    status = run_on_gpu.run(runtime, [], itertools.count().__next__)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "9 of 9 checks passed on fake CUDA" in printed and "| T | " in printed


def test_every_check_runs_on_one_of_the_two():
    """On these streams or, in simulated/test_gpu_checks.py, on the simulated device."""
    assert all(one.needs in ({"streams"}, {"tensors"}, {"tensors", "traffic"}) for one in CHECKS)


@pytest.mark.parametrize(("words", "status", "number"), [(["Python"], 1, 2), (["nothing"], 1, 0)])
def test_words_and_failures(runtime, enabled, capsys, monkeypatch, words, status, number):
    monkeypatch.setattr(runtime, "moe_sft", None)
    assert run_on_gpu.run(runtime, words, itertools.count().__next__) == status
    printed = capsys.readouterr().out
    assert printed.count("FAIL ") == printed.count("'NoneType' object is not callable") == number


def raising(runtime):
    yield {"figure": 1.0}
    raise ValueError("wrong")


def test_failures_and_the_end_of_the_time(runtime):
    times = iter([0.0, 1.0, 2.0, 5.0, 9.0])
    given = [Check(name, frozenset(), raising) for name in ("first", "second", "late")]
    first, second, late = run_checks(runtime, given, times.__next__, deadline=9.0)
    assert (first.result, first.seconds, second.seconds, late.result) == ("fail", 1.0, 3.0, "not run")
    assert "ValueError: wrong" in first.error and first.line().startswith("FAIL ")
    assert tables([first, late]) == "\n| figure |\n| --- |\n| 1 |"


def test_long_calls_have_fewer_rounds(monkeypatch):
    monkeypatch.setattr(Cuda, "__init__", lambda self, clock: setattr(self, "_clock", clock))
    monkeypatch.setattr(Cuda, "synchronize", lambda self: None)
    calls = []
    for step, rounds in ((0.1, 9), (0.3, 4), (60.0, 3)):
        clock = itertools.count(step=step).__next__
        assert Cuda(clock).seconds(lambda: calls.append(None)) == pytest.approx(step)
        assert len(calls) == rounds + 1
        calls.clear()


def test_copies_in_a_trace():
    """Names and fields as torch.profiler writes them."""
    events = [
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "args": {"bytes": 16}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pageable)", "args": {"bytes": 4}},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "args": {"bytes": 8}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "args": {"bytes": 99}},
        {"cat": "kernel", "name": "gemm", "args": {}},
        {"name": "process_name"},
    ]
    counted = count_copies(json.loads(json.dumps(events)))
    assert counted == {
        "down": 20, "copies_down": 2, "pageable_down": 1, "up": 8, "copies_up": 1, "pageable_up": 0,
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_names_of_torch_exist(path):
    """What runs only with CUDA uses functions that this torch has, too."""
    for chain in set(re.findall(r"\btorch(?:\.\w+)+", path.read_text())):
        found = torch
        for name in chain.split(".")[1:]:
            found = getattr(found, name)


def test_without_a_gpu_the_script_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    monkeypatch.setattr(sys, "argv", ["run_on_gpu.py"])
    assert run_on_gpu.main() == 2 and os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    printed = capsys.readouterr()
    assert "finds no CUDA device: nothing was tested" in printed.err and not printed.out
