"""Kills `ktops convert` by SIGKILL at random times, continues it, and compares the result.

    python -m bench.kills MODEL --weight-format int4 --group-size 128
    python -m bench.kills MODEL --kills 30 --seed 1 --weight-format q4_k --quantize-method mse

Each moment is between the begin and the end of writing. After every kill, neither the result nor the
unfinished directory may load unless it is complete, and the next run continues. Whenever a run ends before
it is killed, its files are compared with those of an undisturbed run, and the conversion begins anew. Options
that are not listed below are those of `ktops convert`.

Exit status: 1 if something half-written loads, or the files differ.
"""

import argparse
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ktops.checkpoints import CheckpointError, CheckpointWriter, open_checkpoint
from ktops.checkpoints.checkpoint import PROGRESS
from ktops.checkpoints.writer import checksum

COMMAND = (sys.executable, "-m", "ktops.cli.main", "convert")


def checksums(folder: Path) -> dict[str, int]:
    return {path.name: checksum(path) for path in sorted(folder.iterdir())}


def loads(folder: Path) -> bool:
    try:
        open_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def convert(model: Path, out: Path, options: list[str], seconds: float | None = None) -> float | None:
    """Runs the command; kills it ``seconds`` after it has begun to write.

    Returns:
        How long it wrote; None if it was killed.

    Raises:
        RuntimeError: the command failed.
    """
    progress = CheckpointWriter.partial_path(out) / PROGRESS
    before = modified(progress)
    command = [*COMMAND, str(model), str(out), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and modified(progress) in (before, None):
            time.sleep(0.005)
        start = time.monotonic()
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return None
    if process.returncode:
        raise RuntimeError(errors.decode())
    return time.monotonic() - start


def modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="bench.kills"
    )
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="directory to write and delete (default: beside the model)")
    args, options = parser.parse_known_args()
    out = args.out or args.model.with_name(args.model.name + ".killed")
    partial = CheckpointWriter.partial_path(out)
    if out.exists() or partial.exists():
        parser.error(f"--out: {out} or {partial} already exists")
    seconds = convert(args.model, out, options)
    assert seconds is not None
    expected = checksums(out)
    shutil.rmtree(out)
    print(f"undisturbed: {len(expected)} files, written in {seconds:.2f} s", flush=True)
    moments, kills, compared, wrong = random.Random(args.seed), 0, 0, 0
    while kills < args.kills or out.exists() or partial.exists():
        moment = moments.uniform(0, seconds) if kills < args.kills else None
        ended = convert(args.model, out, options, moment) is not None
        kills += not ended
        half_written = [path for path in (out, partial) if loads(path) and checksums(path) != expected]
        wrong += len(half_written)
        if not ended:
            left = sorted(path.name for path in partial.glob("*.safetensors"))
            print(f"killed after {moment:.2f} s of writing, finished files: {len(left)}", flush=True)
        if out.exists():
            compared += 1
            wrong += checksums(out) != expected
            shutil.rmtree(out)
    print(f"{kills} kills, {compared} results compared, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
