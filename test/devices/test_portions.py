"""Portions of experts are copied in a stream of their own, in an order that any timing respects."""

import pytest
import torch
from streams import World

from ktops.devices import portions, staging, transfer
from ktops.devices.portions import Portions
from ktops.devices.staging import Staging

E = 7


@pytest.fixture
def cpu_as_accelerator(monkeypatch):
    monkeypatch.setattr(portions, "PINNED", ("cpu",))
    monkeypatch.setattr(transfer, "PINNED", ("cpu",))
    monkeypatch.setattr(portions, "staging", Staging())
    monkeypatch.setattr(staging, "pinned", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))


def weights() -> dict[str, torch.Tensor]:
    return {"codes": torch.randint(256, (E, 3, 5), dtype=torch.uint8), "scale": torch.randn(E, 3)}


def run(world: World, given: dict[str, torch.Tensor], stop: bool) -> None:
    """Uses random portions in the main stream, then memory that was theirs."""
    memory: dict[int, torch.Tensor] = {}
    with Portions(given, 3, torch.device("cpu")) as copies:
        for _ in range(world.random.randint(1, 6)):
            experts = sorted(world.random.sample(range(E), world.random.randint(1, 3)))
            with copies.on_device(experts) as portion:
                for name, tensor in portion.items():
                    world.access(world.main, tensor, False)
                    assert torch.equal(tensor, given[name][experts])
                    memory[tensor.data_ptr()] = tensor
                if stop:
                    break
    for tensor in memory.values():
        world.access(world.main, tensor, True)


@pytest.mark.parametrize("stop", [False, True], ids=["complete", "interrupted"])
def test_any_timing(cpu_as_accelerator, monkeypatch, stop):
    given = weights()
    for seed in range(100):
        with monkeypatch.context() as patch, World(patch, seed) as world:
            patch.setattr(portions, "staging", Staging())
            for _ in range(3):
                run(world, given, stop)


def test_staging_is_reused(cpu_as_accelerator, monkeypatch):
    given = weights()
    with monkeypatch.context() as patch, World(patch, 0):
        for _ in range(20):
            with Portions(given, 3, torch.device("cpu")) as copies, copies.on_device([1, 2]):
                pass
        blocks = portions.staging._idle
    assert 4 <= len(blocks) < 20


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", ["copies", "use"])
def test_error(cpu_as_accelerator, monkeypatch, after):
    """Memory may be reused after an error, even one between copies and their event."""
    given = weights()
    with monkeypatch.context() as patch, World(patch, 0) as world:
        recorded = portions.recorded

        def record(device: torch.device) -> torch.Event:
            if world.current is not world.main:
                raise Stop
            return recorded(device)

        if after == "copies":
            patch.setattr(portions, "recorded", record)
        copies = Portions(given, 3, torch.device("cpu"))
        with pytest.raises(Stop), copies, copies.on_device([0, 4]):
            raise Stop
        for buffer in copies._buffers:
            for name, tensor in buffer.tensors.items():
                world.access(world.main, tensor, True)
                world.access(world.host, buffer.blocks[name].data, True)
        assert len(portions.staging._idle) == 4
