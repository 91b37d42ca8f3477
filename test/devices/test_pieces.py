"""Pieces of experts are copied in a stream of their own, in an order that any timing respects."""

import pytest
import torch
from streams import PageableStaging, World

from ktops.devices import pieces, transfer
from ktops.devices.pieces import Pieces

E = 7


@pytest.fixture
def cpu_as_accelerator(monkeypatch):
    monkeypatch.setattr(pieces, "PINNED", ("cpu",))
    monkeypatch.setattr(transfer, "PINNED", ("cpu",))
    monkeypatch.setattr(pieces, "staging", PageableStaging())


def weights() -> dict[str, torch.Tensor]:
    return {"codes": torch.randint(256, (E, 3, 5), dtype=torch.uint8), "scale": torch.randn(E, 3)}


def run(world: World, given: dict[str, torch.Tensor], stop: bool) -> None:
    """Uses random pieces in the main stream, then memory that was theirs."""
    memory: dict[int, torch.Tensor] = {}
    with Pieces(given, 3, torch.device("cpu")) as copies:
        for _ in range(world.random.randint(1, 6)):
            experts = sorted(world.random.sample(range(E), world.random.randint(1, 3)))
            with copies.on_device(experts) as piece:
                for name, tensor in piece.items():
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
            patch.setattr(pieces, "staging", PageableStaging())
            for _ in range(3):
                run(world, given, stop)


def test_staging_is_reused(cpu_as_accelerator, monkeypatch):
    given = weights()
    with monkeypatch.context() as patch, World(patch, 0):
        for _ in range(20):
            with Pieces(given, 3, torch.device("cpu")) as copies, copies.on_device([1, 2]):
                pass
        blocks = pieces.staging._idle
    assert 4 <= len(blocks) < 20


class Stop(Exception):
    pass


def test_blocks_return_after_an_error(cpu_as_accelerator, monkeypatch):
    with monkeypatch.context() as patch, World(patch, 0) as world:
        copies = Pieces(weights(), 3, torch.device("cpu"))
        with pytest.raises(Stop), copies, copies.on_device([0, 4]) as piece:
            raise Stop
        world.access(world.main, piece["scale"], True)
        assert len(pieces.staging._idle) == 4
