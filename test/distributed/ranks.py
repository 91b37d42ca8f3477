"""Runs a program of this folder in several processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

import ktops
from ktops.testing.torchrun import torchrun

HERE = Path(__file__).parent


def once(folder: Path, run: Callable[[], object]) -> None:
    """Calls ``run``, unless another worker of pytest-xdist does or has done so for this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            run()
            (folder / "done").touch()


def run_ranks(program: str, world_size: int, *arguments: object, timeout: float = 500) -> str:
    """Runs a program under torchrun, and returns what it printed.

    Args:
        program: a file in this folder.
        world_size: number of processes; with 0, one process without torchrun.
        timeout: seconds.
    """
    rest = [HERE / program, *arguments]
    command = torchrun(world_size, *rest) if world_size else [sys.executable, *map(str, rest)]
    path = [Path(ktops.__file__).parents[1], HERE, HERE.parent / "integrations", *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        env=environment,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
