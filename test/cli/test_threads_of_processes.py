"""The threads of each of several processes."""

import os
import warnings
from types import SimpleNamespace

import pytest
import torch

from ktops.cli import processes


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
    def names(numbers) -> set[str]:
        return {str(number) for number in numbers}

    assert processes.share_of(names(cores), [names(others) for others in of_all]) == expected


@pytest.fixture
def three_processes(monkeypatch):
    """Two on this host, which may use the same CPU, and one on another host."""
    cpu = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {cpu})
    monkeypatch.setattr(processes, "_run", SimpleNamespace(rank=0, count=3))
    monkeypatch.setattr(processes, "gather", lambda value: [value, value, ("there", value[1])])
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


def test_one_process_keeps_its_threads():
    before = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processes.share_threads(None) == (before, len(os.sched_getaffinity(0)))
