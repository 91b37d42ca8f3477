"""Simulated streams that check the order of memory accesses instead of waiting.

The host and every stream have a vector clock, which events carry from one to another. Two accesses to a
memory, one of which writes, must be ordered by these clocks; the time at which they happen does not matter.
"""

import random
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Actor:
    """The host or a stream."""

    def __init__(self, *_) -> None:
        self.clock: Counter[Actor] = Counter()

    def learn(self, clock: Counter["Actor"]) -> None:
        self.clock |= clock

    def wait_event(self, event: "Event") -> None:
        self.learn(event.clock)


class World(TorchDispatchMode):
    """The streams of a process. Copies with ``non_blocking`` run in the current one, others on the host.

    Storages are kept, so that no address is reused.

    Args:
        monkeypatch: puts the simulated streams and events in the place of torch's.
        seed: of the random answers of ``Event.query``.
    """

    def __init__(self, monkeypatch, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.host, self.main = Actor(), Actor()
        self.current = self.main
        self.accesses: dict[int, tuple[torch.UntypedStorage, list[tuple[Actor, int, bool]]]] = {}
        world = self

        class Stream(Actor):
            def __enter__(self) -> None:
                self.before, world.current = world.current, self

            def __exit__(self, *_) -> None:
                world.current = self.before

            def synchronize(self) -> None:
                world.host.learn(self.clock)

        class WorldEvent(Event):
            host, random = world.host, world.random

        monkeypatch.setattr(torch, "Stream", Stream)
        monkeypatch.setattr(torch, "Event", WorldEvent)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: world.current)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            target, source, *non_blocking = args
            actor = self.current if any(non_blocking) else self.host
            self.access(actor, source, False)
            self.access(actor, target, True)
        return func(*args, **(kwargs or {}))

    def access(self, actor: Actor, tensor: torch.Tensor, writes: bool) -> None:
        """Records an access, and asserts that it is ordered after all that it conflicts with."""
        actor.learn(self.host.clock)
        actor.clock[actor] += 1
        storage = tensor.untyped_storage()
        _, earlier = self.accesses.setdefault(storage.data_ptr(), (storage, []))
        for other, time, wrote in earlier:
            assert not (writes or wrote) or actor.clock[other] >= time, "two accesses are not ordered"
        earlier.append((actor, actor.clock[actor], writes))


class Event:
    """An event whose ``query`` is sometimes false, as if the stream were late."""

    host: Actor
    random: random.Random

    def __init__(self, device: torch.device) -> None:
        self.clock: Counter[Actor] = Counter()

    def record(self, stream: Actor) -> None:
        self.clock = stream.clock | self.host.clock

    def synchronize(self) -> None:
        self.host.learn(self.clock)

    def query(self) -> bool:
        done = self.random.random() < 0.5
        if done:
            self.synchronize()
        return done
