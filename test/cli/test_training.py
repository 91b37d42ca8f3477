"""The order of examples, and the figures that training reports."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ktops.cli.finetune.encoding import IGNORED
from ktops.cli.finetune.plot import running_mean
from ktops.cli.finetune.step_parts import Clock
from ktops.cli.finetune.timing import KtTime
from ktops.cli.finetune.training import BatchOrder, _count_right


def test_batches_have_similar_lengths_and_every_example_comes_once():
    lengths = [i * 37 % 101 for i in range(205)]
    order = BatchOrder(lengths, 4, seed=0)
    first = list(order)
    assert sorted(first) == list(range(205)) and len(order) == 205
    padded = sum(
        len(batch) * max(lengths[i] for i in batch) for batch in (first[i : i + 4] for i in range(0, 205, 4))
    )
    assert padded < 1.15 * sum(lengths)
    longest = [max(lengths[i] for i in first[start : start + 4]) for start in range(0, 200, 4)]
    assert abs(np.corrcoef(longest, range(50))[0, 1]) < 0.3


def test_order_depends_on_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = BatchOrder(list(range(50)), 4, seed)
        sampler.set_epoch(epoch)
        torch.rand(3)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)


def test_processes_take_batches_in_turn():
    """21 examples are 11 batches, 4 turns of three processes; the last batch has one example."""
    lengths = [i * 37 % 101 for i in range(21)]
    whole = list(BatchOrder(lengths, 2, seed=0))
    batches = [whole[i : i + 2] for i in range(0, 21, 2)]
    orders = [BatchOrder(lengths, 2, seed=0, rank=rank, world_size=3) for rank in range(3)]
    batches.append([len(lengths)])
    for order in orders:
        assert list(order) == [example for batch in batches[order.rank :: 3] for example in batch]
    assert [len(order) for order in orders] == [len(list(order)) for order in orders] == [8, 7, 7]


def test_accuracies_count_answer_tokens_only():
    labels = np.array([[9, IGNORED, 5, 6], [9, 7, 8, IGNORED]])
    guesses = np.array([[0, 5, 6, 0], [7, 0, 0, 0]])
    result = _count_right(SimpleNamespace(predictions=guesses, label_ids=labels))
    assert result == {"token_accuracy": 3 / 4, "answer_accuracy": 1 / 2}


def test_kt_time_counts_calls_during_steps_only():
    original = torch.ops.kt.moe_fwd
    clock = Clock()
    kt = KtTime(clock)
    kt.on_train_begin(None, None, None)
    assert torch.ops.kt.moe_fwd is not original
    clock.start("rest")
    with pytest.raises(RuntimeError, match="missing value"):
        torch.ops.kt.moe_fwd()
    clock.stop()
    with pytest.raises(RuntimeError, match="missing value"):
        torch.ops.kt.moe_fwd()
    kt.on_train_end(None, None, None)
    assert torch.ops.kt.moe_fwd is original
    assert kt.summary(1.0)["ops"]["moe_fwd"]["calls"] == 1
    assert kt.summary(0.0) is None


def test_running_mean_starts_at_the_first_value():
    assert running_mean([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert running_mean([0.0, 1.0])[1] == pytest.approx(0.1 / 0.19)
