"""Workers: results in the order of the tasks, one thread of PyTorch's per task, and a quick end."""

import threading
from concurrent.futures import CancelledError
from functools import partial

import pytest
import torch

from ktops._workers import AHEAD, Workers, require_not_stopped

THREADS = [1, 3]


@pytest.mark.parametrize("num_threads", THREADS)
def test_results_in_order(num_threads):
    with Workers(num_threads) as workers:
        tasks = (partial(pow, 2, power) for power in range(200))
        assert list(workers.in_order(tasks)) == [2**power for power in range(200)]


def test_tasks_run_at_the_same_time():
    """Each task waits for the next one, so one after the other they would never end."""
    begun = [threading.Event() for _ in range(3)]

    def task(number: int) -> bool:
        begun[number].set()
        return number + 1 == len(begun) or begun[number + 1].wait(60)

    with Workers(3) as workers:
        assert list(workers.in_order(partial(task, number) for number in range(3))) == [True] * 3


@pytest.mark.parametrize("num_threads", THREADS)
def test_one_thread_of_pytorch_per_task(num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Workers(num_threads) as workers:
            assert set(workers.in_order([torch.get_num_threads] * 6)) == {1}
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), Workers(num_threads) as workers:
            list(workers.in_order([lambda: 1 // 0]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_tasks_are_taken_as_they_are_needed():
    """The first task ends when as many have been taken as may wait."""
    release, taken, most = threading.Event(), [], AHEAD + 4 * 2 - 1

    def tasks():
        yield partial(release.wait, 60)
        for number in range(10 * AHEAD):
            taken.append(number)
            if len(taken) == most:
                release.set()
            yield partial(int, number)

    with Workers(2) as workers:
        results = workers.in_order(tasks())
        assert next(results) is True
        assert len(taken) == most
        assert list(results) == list(range(10 * AHEAD))


@pytest.mark.parametrize("num_threads", THREADS)
def test_the_first_error_in_the_order_of_tasks(num_threads):
    """The second task fails first."""
    failed = threading.Event()

    def first():
        assert num_threads == 1 or failed.wait(60)
        raise KeyError("first")

    def second():
        failed.set()
        raise KeyError("second")

    with Workers(num_threads) as workers, pytest.raises(KeyError, match="first"):
        list(workers.in_order([first, second]))


def test_stopping_ends_tasks_and_drops_the_others():
    begun, ended, later = threading.Event(), [], []

    def long():
        begun.set()
        try:
            while True:
                require_not_stopped()
        except CancelledError:
            ended.append(True)
            raise

    def interrupted():
        yield from [long, long]
        begun.wait(60)
        yield partial(later.append, True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Workers(2) as workers:
        list(workers.in_order(interrupted()))
    assert ended and not later
    assert not any(thread.name.startswith("ktops_") for thread in threading.enumerate())
    require_not_stopped()


@pytest.mark.parametrize("num_threads", THREADS)
def test_in_inference_mode(num_threads):
    """Tensors made in inference mode can be filled only in inference mode."""
    with torch.inference_mode(), Workers(num_threads) as workers:
        made = torch.zeros(4)
        list(workers.in_order(partial(made[index].fill_, index) for index in range(4)))
    assert made.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("num_threads", [0, -1])
def test_bad_number(num_threads):
    with pytest.raises(ValueError, match=f"num_threads must be at least 1, got {num_threads}"):
        Workers(num_threads)
