"""Kills commands of ktops by SIGKILL at random times, continues them, and compares the results.

    python -m bench.kills convert MODEL --weight-format int4 --group-size 128
    python -m bench.kills finetune --model MODEL --data FILE --max-steps 8 --save-steps 2
    python -m bench.kills --processes 2 finetune --model MODEL --data FILE --max-steps 8 --save-steps 2
    python -m bench.kills chat MODEL --prompt Hello --temperature 0 --max-new-tokens 32
    python -m bench.kills --kills 30 --seed 1 convert MODEL --weight-format q4_k --quantize-method mse

After every kill, nothing that the command writes may load unless it is complete, and the command is run
again: a conversion with the same options, fine-tuning with --resume. Whenever a result is complete, it is
compared with that of an undisturbed run, and all begins anew. The moments of a conversion are between the
begin and the end of writing, those of the others while their process runs. Of several processes, one is
killed, and the others must end by themselves.

Exit status: 1 if something half-written loads, or the results differ.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path

import psutil
from safetensors.torch import load_file

from ktops.checkpoints import CheckpointError, CheckpointWriter, open_checkpoint
from ktops.checkpoints.checkpoint import PROGRESS
from ktops.checkpoints.writer import checksum
from ktops.cli.finetune import run_directory
from ktops.testing.torchrun import torchrun

COMMAND = (sys.executable, "-m", "ktops.cli.main")
METRICS = "metrics.json"
LIMIT = 60
"""Seconds that processes get to end after one of them."""


class Command(ABC):
    """A command that is killed and run again.

    Args:
        arguments: of the command, without what names its output.
        out: a path that does not exist, for what it writes.
        processes: that torchrun starts, if more than one.
    """

    def __init__(self, arguments: list[str], out: Path, processes: int = 1) -> None:
        self.arguments, self.out, self.processes, self.printed = arguments, out, processes, ""

    @abstractmethod
    def next(self) -> list[str]:
        """Returns the arguments to begin with, or to continue what is there."""

    def wait_for_begin(self, process: subprocess.Popen) -> None:
        """Returns when the time of the kills begins. Default: at once."""
        return

    def is_complete(self) -> bool:
        """Returns whether the result of a killed run is complete."""
        return False

    @abstractmethod
    def half_written(self, expected: dict) -> list[Path]:
        """Returns what loads although it is not complete."""

    @abstractmethod
    def result(self) -> dict:
        """Returns what two complete runs must have in common."""

    def delete(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)

    def run(self, seconds: float | None = None) -> float | None:
        """Runs the command; kills it after some time.

        Returns:
            How long it took; None if it was killed.

        Raises:
            RuntimeError: the command failed.
        """
        launcher = COMMAND if self.processes == 1 else torchrun(self.processes, *COMMAND[1:])
        command = [*launcher, *self.next()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            self.wait_for_begin(process)
            start = time.monotonic()
            try:
                self.printed, errors = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                if self.processes == 1:
                    process.kill()
                else:
                    kill_one(process)
                return None
        if process.returncode:
            raise RuntimeError(errors)
        return time.monotonic() - start


def kill_one(torchrun: subprocess.Popen) -> None:
    """Kills one of the processes that torchrun has started, or torchrun if there are none.

    Raises:
        RuntimeError: the others do not end.
    """
    started = psutil.Process(torchrun.pid).children()
    random.choice(started or [torchrun]).kill()
    try:
        torchrun.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{started} do not end, although one of them was killed") from None


class Convert(Command):
    @property
    def partial(self) -> Path:
        return CheckpointWriter.partial_path(self.out)

    def next(self) -> list[str]:
        model, *options = self.arguments
        self._before = _modified(self.partial / PROGRESS)
        return ["convert", model, str(self.out), *options]

    def wait_for_begin(self, process: subprocess.Popen) -> None:
        while process.poll() is None and _modified(self.partial / PROGRESS) in (self._before, None):
            time.sleep(0.005)

    def is_complete(self) -> bool:
        return self.out.exists()

    def half_written(self, expected: dict) -> list[Path]:
        paths = self.out, self.partial
        return [path for path in paths if _loads(path) and _checksums(path) != expected]

    def result(self) -> dict:
        return _checksums(self.out)

    def delete(self) -> None:
        super().delete()
        shutil.rmtree(self.partial, ignore_errors=True)


class Finetune(Command):
    def next(self) -> list[str]:
        resume = ["--resume"] if run_directory.holds_run(self.out) else self.arguments
        return ["finetune", "--output-dir", str(self.out), *resume]

    def is_complete(self) -> bool:
        return (self.out / METRICS).exists()

    def half_written(self, expected: dict) -> list[Path]:
        try:
            whole = self.result()["adapter"] == expected["adapter"]
        except Exception:  # it does not load
            whole = True
        metrics = self.out / METRICS
        return [path for path, right in ((self.out, whole), (metrics, _is_json(metrics))) if not right]

    def result(self) -> dict:
        json.loads((self.out / "adapter_config.json").read_text())  # PEFT orders its lists at random
        adapter = self.out / "adapter_model.safetensors"
        load_file(adapter)
        metrics = self.out / METRICS
        losses = (
            [step["loss"] for step in json.loads(metrics.read_text())["steps"]] if metrics.exists() else []
        )
        return {"adapter": checksum(adapter), "losses": losses}


class Chat(Command):
    def next(self) -> list[str]:
        self.out.mkdir(exist_ok=True)
        return ["chat", *self.arguments, "--metrics", str(self.out / METRICS)]

    def half_written(self, expected: dict) -> list[Path]:
        metrics = self.out / METRICS
        return [] if _is_json(metrics) else [metrics]

    def result(self) -> dict:
        return {"answer": self.printed, "files": [path.name for path in self.out.iterdir()]}


COMMANDS: dict[str, type[Command]] = {"convert": Convert, "finetune": Finetune, "chat": Chat}


def _checksums(folder: Path) -> dict[str, int]:
    return {path.name: checksum(path) for path in sorted(folder.iterdir())}


def _loads(folder: Path) -> bool:
    try:
        open_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def _is_json(path: Path) -> bool:
    """Returns whether a file is complete or absent."""
    try:
        return not path.exists() or bool(json.loads(path.read_text()))
    except ValueError:
        return False


def _modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def try_kills(command: Command, number: int, seed: int) -> int:
    """Prints what happens; returns how many results were wrong."""
    seconds = command.run()
    assert seconds is not None
    expected = command.result()
    command.delete()
    print(f"undisturbed: {seconds:.2f} s", flush=True)
    moments, kills, compared, wrong = random.Random(seed), 0, 0, 0
    unfinished = False
    while kills < number or unfinished:
        moment = moments.uniform(0, seconds) if kills < number else None
        killed = command.run(moment) is None
        unfinished = killed and not command.is_complete()
        half_written = command.half_written(expected)
        wrong += len(half_written)
        for path in half_written:
            print(f"loads half-written: {path}", flush=True)
        if killed:
            kills += 1
            print(f"killed after {moment:.2f} s", flush=True)
        if not unfinished:
            compared += 1
            wrong += command.result() != expected
            command.delete()
    print(f"{kills} kills, {compared} results compared, {wrong} wrong")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="bench.kills"
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("killed"), help="path to write and delete")
    parser.add_argument("--processes", type=int, default=1, help="of torchrun, for finetune")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command, without its output")
    args = parser.parse_args(argv)
    if args.processes > 1 and args.command != "finetune":
        parser.error("--processes: only finetune runs in several processes")
    command = COMMANDS[args.command](args.arguments, args.out, args.processes)
    if args.out.exists() or CheckpointWriter.partial_path(args.out).exists():
        parser.error(f"--out: {args.out} already exists")
    return int(try_kills(command, args.kills, args.seed) > 0)


if __name__ == "__main__":
    sys.exit(main())
