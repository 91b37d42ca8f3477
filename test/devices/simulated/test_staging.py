"""Pinned memory for copies: reused, but not before the copy that reads it has ended.

The simulated device has no streams, so its copies up are delayed here until their event is waited for.
"""

import threading
import weakref
from typing import ClassVar

import pytest
import torch
from simulated.conftest import inputs, on_device

import ktops
from ktops.devices import staging, streams, transfer
from ktops.ops.check_devices import LORA
from ktops.testing.inputs import require_grad
from ktops.testing.simulated_device import traffic


class Event:
    """An event at the end of the device's work so far, which runs when somebody waits for it."""

    waiting: ClassVar[list["Event"]] = []

    def __init__(self) -> None:
        self.done = False
        self.waiting.append(self)

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


@pytest.fixture
def pinned(monkeypatch, device):
    """The sizes of the blocks that were pinned, on a device whose copies go through pinned memory."""
    sizes = []

    def pinned(nbytes: int) -> torch.Tensor:
        sizes.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    Event.waiting.clear()
    monkeypatch.setattr(staging, "pinned", pinned)
    monkeypatch.setattr(transfer, "PINNED", (device.type,))
    monkeypatch.setattr(transfer, "recorded", lambda device: Event())
    yield sizes
    for event in Event.waiting:
        event.synchronize()
    ktops.empty_cache()


def test_the_same_results(pinned, device):
    given = inputs(dtype=torch.bfloat16, weights_dtype=torch.float32, ids_dtype=torch.int32)
    names = ("hidden_states", "topk_weights", *LORA)
    results = []
    for arguments in (given, on_device(given, *LORA)):
        arguments = require_grad(arguments, *names)
        output = ktops.moe_sft(**arguments)
        output.float().sin().sum().backward()
        results.append([output, *(arguments[name].grad for name in names)])
    assert pinned
    for expected, actual in zip(*results, strict=True):
        assert actual.device == device and torch.equal(actual.cpu(), expected)


def test_blocks_are_reused_once_their_copy_has_ended(pinned):
    given = on_device(inputs())
    for _ in range(3):
        ktops.moe_sft(**given)
        Event.waiting[-1].synchronize()
    assert len(pinned) == 3, "tokens and routes down at once, of which one block serves for the output"
    ktops.moe_sft(**given)
    ktops.moe_sft(**given)
    assert len(pinned) == 4, "the first output may still be on its way"


def test_a_block_is_not_written_while_a_copy_reads_it(pinned, device):
    written = []
    for value in range(5):
        with transfer.staging.block(64) as block:
            view = block.view(torch.empty(16))
            view.fill_(value)
            block.free_after = transfer.recorded(device)
            written.append(view)
    assert [view[0].item() for view in written] == [0, 1, 2, 3, 4]


def test_statistics_and_release(pinned):
    before = ktops.memory_stats()
    assert before["bytes_pinned"] == 0
    ktops.moe_sft(**on_device(inputs(T=100)))
    stats = ktops.memory_stats()
    assert stats["bytes_pinned"] == sum(pinned) >= 100 * 64 * 4
    assert all(size == 1 << size.bit_length() - 1 for size in pinned)
    ktops.empty_cache()
    assert ktops.memory_stats()["bytes_pinned"] == 0
    assert all(event.done for event in Event.waiting), "released only after the copies that read it"


def test_released_blocks_do_not_stay_in_torchs_cache(pinned, monkeypatch):
    ktops.moe_sft(**on_device(inputs()))
    memory = [weakref.ref(block.data) for block in transfer.staging._idle]
    alive = []

    def empty_host_cache() -> None:
        alive.extend(data() is not None for data in memory)

    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", empty_host_cache)
    ktops.empty_cache()
    assert alive == [False] * len(pinned)


def test_no_copy_begins_without_memory_for_all(pinned, device, monkeypatch):
    """Or else its block would be reused while the device writes to it."""
    tensors, allocate = [torch.ones(4096).to(device), torch.ones(8192).to(device)], staging.pinned

    def fail_for_the_second(nbytes: int) -> torch.Tensor:
        if pinned:
            raise RuntimeError("no memory")
        return allocate(nbytes)

    monkeypatch.setattr(staging, "pinned", fail_for_the_second)
    with traffic() as moved, pytest.raises(RuntimeError, match="no memory"):
        transfer.download(tensors)
    assert pinned == [16384] and not moved


class Captured:
    def capturing(self) -> bool:
        return True


@pytest.mark.parametrize("names", [(), LORA])
def test_copies_down_in_a_capture_are_an_error(pinned, device, monkeypatch, names):
    """Waiting for them would invalidate the capture."""
    monkeypatch.setitem(streams.STREAMS, device.type, Captured())
    with pytest.raises(RuntimeError, match="graph can capture experts only without gradients, with LoRA fac"):
        ktops.moe_sft(**require_grad(on_device(inputs(), *names), "hidden_states"))


def test_threads_do_not_share_a_block(pinned):
    given = on_device(inputs())
    expected = ktops.moe_sft(**given).cpu()
    wrong = []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(ktops.moe_sft(**given).cpu(), expected):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
