"""A bench worker without a process."""

from typing import ClassVar

from bench.contest import ContestError
from bench.worker import Host


class Inside:
    """A worker in this process; ``spoil(name, contestant)`` may replace a contestant."""

    made: ClassVar[list["Inside"]] = []
    asked: ClassVar[list[dict]] = []
    spoil = None

    def __init__(self, python, environment, log, ktops=None) -> None:
        self.environment, self.host = environment, Host()
        Inside.made.append(self)

    def ask(self, do: str, **arguments) -> dict:
        Inside.asked.append({"do": do, **arguments})
        reply = self.host.handle({"do": do, **arguments})
        if "error" in reply:
            raise ContestError(reply["error"])
        if do == "load" and Inside.spoil:
            contestants = self.host.contestants
            self.host.contestants = {k: Inside.spoil(k, v) for k, v in contestants.items()}
        return reply

    def close(self) -> None:
        self.host = None
