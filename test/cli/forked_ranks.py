"""Runs the command in several processes as torchrun does, without the seconds that each takes to import."""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

LIMIT = 200
"""Seconds after which a process is taken to hang."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["peft", "ktops.cli.finetune.run", "ktops.cli.main", "transformers.models.qwen3_moe.modeling_qwen3_moe"]
)


class Ranks:
    """Processes that run the same command; what they print is in files in ``folder``."""

    def __init__(self, count: int, arguments: list[object], folder: Path, port: int, hook=None) -> None:
        self.files = [folder / f"rank-{rank}" for rank in range(count)]
        for file in self.files:
            file.unlink(missing_ok=True)
        environment = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": 1,
        }
        texts = [str(argument) for argument in arguments]
        self.processes = [
            _server.Process(
                target=_run,
                args=(texts, {**environment, "RANK": rank, "LOCAL_RANK": rank}, folder, file, hook),
            )
            for rank, file in enumerate(self.files)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> tuple[list[int | None], list[str]]:
        """Returns the exit statuses and what each process printed; None for a process that hangs."""
        for process in self.processes:
            process.join(LIMIT)
        return [process.exitcode for process in self.processes], self.printed()

    def printed(self) -> list[str]:
        return [file.read_text() if file.exists() else "" for file in self.files]

    def wait_for(self, text: str, rank: int = 0) -> None:
        """Returns when a process has printed a text."""
        for _ in range(100 * LIMIT):
            if text in self.printed()[rank]:
                return
            assert self.processes[rank].is_alive(), self.printed()[rank]
            time.sleep(0.01)
        raise AssertionError(f"no {text!r} in {self.printed()[rank]}")

    def signal(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)


@contextmanager
def started(count: int, arguments: list[object], folder: Path, hook=None) -> Iterator[Ranks]:
    """Starts processes in a folder.

    Args:
        hook: a function of a module that each process calls first.
    """
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=LIMIT)
    )
    ranks = Ranks(count, arguments, folder, store.port, hook)
    try:
        yield ranks
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _run(arguments: list[str], environment: dict[str, object], folder: Path, file: Path, hook) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(folder)
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    if hook is not None:
        hook()
    sys.argv = ["ktops", *arguments]
    from ktops.cli import main

    main.main()
