"""`ktops convert` killed by SIGKILL in a call of the system: nothing half-written loads, and it continues.

Each kill is a forked process that kills itself in the chosen call; a write is first done by half.
``python -m bench.kills`` kills whole commands at random times instead.
"""

import io
import json
import os
import random
import shutil
import signal

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from ktops.checkpoints import CheckpointError, open_checkpoint
from ktops.cli.convert import Options, convert

CALLS = ("pwrite", "ftruncate", "fsync", "replace", "unlink", "rmdir")

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Killed:
    """Replaces the calls that change files by those that count, and kill the process in one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count = at, 0

    def install(self, setattr) -> "Killed":
        for name in CALLS:
            setattr(os, name, self._counting(getattr(os, name), half=name == "pwrite"))
        return self

    def _counting(self, call, *, half: bool):
        def counting(*arguments, **options):
            self.count += 1
            if self.count == self.at:
                if half:
                    descriptor, data, offset = arguments
                    call(descriptor, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counting


@pytest.fixture(scope="module")
def source(model_directory, tmp_path_factory):
    """A model without a configuration that transformers would be asked about."""
    folder = tmp_path_factory.mktemp("source")
    save_file(load_file(model_directory / "model.safetensors"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_act": "silu"}))
    shutil.copy(model_directory / "tokenizer.json", folder)
    return folder


@pytest.fixture
def run(source, tmp_path):
    def run(*, num_threads: int = 1, overwrite: bool = False) -> None:
        options = Options(source, tmp_path / "out", "int4", 32, num_threads=num_threads, overwrite=overwrite)
        convert(options, Console(file=io.StringIO()))

    return run


@pytest.fixture
def run_killed(run):
    """Runs a conversion in another process, which is killed in the given call; returns whether it was."""

    def run_killed(at: int, **options) -> bool:
        child = os.fork()
        if child == 0:
            try:
                Killed(at).install(setattr)
                run(**options)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        return status == signal.SIGKILL

    return run_killed


@pytest.fixture
def whole(run, tmp_path, monkeypatch):
    """The files of a conversion that is not interrupted, and the number of its calls."""
    with monkeypatch.context() as patch:
        calls = Killed().install(patch.setattr)
        run()
    made = files(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    return made, calls.count


def files(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def expect_nothing_half_written(tmp_path, expected: dict[str, bytes]) -> None:
    for path in (tmp_path / "out", tmp_path / "out.partial"):
        try:
            open_checkpoint(path)
        except CheckpointError as error:
            message = str(error)
            assert str(path) in message
            assert any(text in message for text in ("no such file", "still being written", "no safetensors"))
        else:
            assert files(path) == expected


def test_in_any_call(run, run_killed, whole, tmp_path):
    """Killed in the first, the last and some other calls, and continued each time."""
    expected, count = whole
    points = {1, 2, 3, *range(count - 6, count + 1), *random.Random(0).sample(range(4, count - 6), 5)}
    for at in sorted(points):
        assert run_killed(at)
        expect_nothing_half_written(tmp_path, expected)
        if not (tmp_path / "out").exists():
            run()
        assert files(tmp_path / "out") == expected
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("num_threads", [1, 3])
def test_again_and_again(run, run_killed, whole, tmp_path, num_threads):
    """Each process continues what the one before had left, until one is not killed."""
    expected, _ = whole
    distance = random.Random(num_threads)
    kills = 0
    while run_killed(distance.randrange(20, 90), num_threads=num_threads):
        kills += 1
        expect_nothing_half_written(tmp_path, expected)
    assert kills > 1 and files(tmp_path / "out") == expected


def test_while_replacing(run, run_killed, whole, tmp_path):
    """There is always a complete result, under its name or beside it, and no rest in the end."""
    expected, count = whole
    (tmp_path / "kept").mkdir()
    for at in range(count - 2, count + 6):
        run()
        killed = run_killed(at, overwrite=True)
        expect_nothing_half_written(tmp_path, expected)
        assert killed or at > count
        complete = [path for path in tmp_path.glob("out*") if files(path) == expected]
        assert complete
        run(overwrite=True)
        assert files(tmp_path / "out") == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "out"]
        shutil.rmtree(tmp_path / "out")
