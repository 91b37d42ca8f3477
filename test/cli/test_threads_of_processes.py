"""The threads of each of several processes."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from ktops import numa
from ktops.cli import processes
from ktops.numa.binding import AlreadyBoundError


@pytest.mark.parametrize(
    ("cores", "of_all", "expected"),
    [
        (range(8), [range(8), range(8)], 4),
        (range(8), [range(8)] * 3, 2),
        (range(4), [range(4), range(4, 8)], 4),
        (range(2), [range(2)] * 3, 1),
        (range(6), [range(6), range(4), range(4, 6)], 3),
    ],
)
def test_share(cores, of_all, expected):
    assert processes.share_of(set(cores), [set(others) for others in of_all]) == expected


@pytest.fixture
def three_processes(monkeypatch):
    """Two on this host, which may use the same CPU, and one on another host."""
    cpu = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {cpu})
    monkeypatch.setattr(
        processes, "_run", SimpleNamespace(rank=0, world_size=3, local_rank=0, local_world_size=2)
    )
    monkeypatch.setattr(processes, "all_gather", lambda value: [value, value, ("there", value[1])])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_too_many_threads_are_told(three_processes):
    with pytest.warns(
        UserWarning, match=r"the 2 processes on .* have 2 threads for 1 cores, so they wait"
    ) as told:
        assert processes.share_threads(None) == (1, 1)
    assert len(told) == 1 and os.environ["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("count", [1, 2])
def test_processes_are_bound_to_numa_nodes(three_processes, monkeypatch, count):
    """On a host with several nodes, even if the launcher has bound them, which is an error of bind_rank's."""
    calls = []

    def bind_rank(rank: int, size: int) -> None:
        calls.append((rank, size))
        raise AlreadyBoundError(
            "bind_rank: this process may only use CPUs 0, and the one that started it CPUs 0-1"
        )

    monkeypatch.setattr(processes, "numa_nodes", lambda: [None] * count)
    monkeypatch.setattr(numa, "bind_rank", bind_rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processes.share_threads(None)
    assert calls == [(0, 2)] * (count - 1)


def test_other_errors_of_binding_are_raised(three_processes, monkeypatch):
    def bind_rank(rank: int, size: int) -> None:
        raise RuntimeError("set_num_threads expects a positive integer")

    monkeypatch.setattr(processes, "numa_nodes", lambda: [None] * 2)
    monkeypatch.setattr(numa, "bind_rank", bind_rank)
    with pytest.raises(RuntimeError, match="expects a positive integer"):
        processes.share_threads(None)


def test_openmp_that_binds_threads():
    """The first thread then has one CPU; the process has all."""
    code = "from ktops.cli import processes; print(*processes.share_threads(2))"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"OMP_PROC_BIND": "true"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    cpus = len(os.sched_getaffinity(0))
    assert out == f"{min(2, cpus)} {cpus}\n"


def test_one_process_keeps_its_threads():
    before = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processes.share_threads(None) == (before, len(os.sched_getaffinity(0)))
