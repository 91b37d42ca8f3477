"""Compares the time of `ktops convert` with that of reading and writing as many bytes.

    python -m bench.models make --like deepseek-v2-lite --layers 3 MODEL
    python -m bench.convert MODEL --format int4 --group-size 128
    python -m bench.convert MODEL --format int4 --report full none --num-threads 1 2

Copying reads the source in blocks of 16 MiB, writes as many bytes as the result has, and waits until they are
on the disk, with the same number of threads. Copying and converting take turns; each line is the median of
--rounds. CPU is the time of all threads, which other processes disturb less; the bytes after it are the rise
of resident memory. Before each turn, the pages of the source are dropped (--warm: read) and what is being
written is waited for. The result is deleted.
"""

import argparse
import io
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console

from bench.memory import reset_peak, resident_bytes
from ktops._display import format_bytes
from ktops._workers import Workers
from ktops.cli.conversion_report import EXTENTS
from ktops.cli.convert import Options, convert

BLOCK = 1 << 24


class Cost(NamedTuple):
    """Seconds of one run, and the bytes by which resident memory rose meanwhile."""

    wall: float
    cpu: float
    memory: int


def measured(function: Callable[[], object]) -> Cost:
    reset_peak()
    memory, wall, cpu = resident_bytes(), time.monotonic(), time.process_time()
    function()
    return Cost(time.monotonic() - wall, time.process_time() - cpu, resident_bytes(peak=True) - memory)


def sources(folder: Path) -> list[Path]:
    """Returns the files with weights of a model directory."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))


def prepare(files: list[Path], *, warm: bool) -> None:
    """Drops the pages of the files from memory, or reads them all, and waits for everything being written."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            if warm:
                while file.read(BLOCK):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(files: list[Path], nbytes: int, path: Path, num_threads: int) -> None:
    """Reads files and writes ``nbytes`` to a path, evenly spread over the reads."""
    total = sum(file.stat().st_size for file in files)
    target = os.open(path, os.O_CREAT | os.O_WRONLY)
    descriptors = [os.open(file, os.O_RDONLY) for file in files]

    def block(descriptor: int, offset: int, position: int) -> None:
        data = memoryview(bytearray(BLOCK))
        data = data[: os.preadv(descriptor, [data], offset)]
        begin, end = (nbytes * place // total for place in (position, position + len(data)))
        os.pwrite(target, data[: end - begin], begin)

    tasks, position = [], 0
    for file, descriptor in zip(files, descriptors, strict=True):
        size = file.stat().st_size
        tasks += [partial(block, descriptor, offset, position + offset) for offset in range(0, size, BLOCK)]
        position += size
    with Workers(num_threads) as workers:
        for _ in workers.in_order(tasks):
            pass
    os.fsync(target)
    for descriptor in (target, *descriptors):
        os.close(descriptor)
    path.unlink()


def compare(options: Options, rounds: int, threads: int, *, warm: bool) -> tuple[list[Cost], list[Cost], int]:
    """Returns the costs of copying and of converting in turns, and the size of the result."""
    files, copies, conversions = sources(options.source), [], []
    console = Console(file=io.StringIO())
    convert(options, console)
    nbytes = sum(path.stat().st_size for path in options.destination.iterdir())
    for _ in range(rounds):
        shutil.rmtree(options.destination)
        prepare(files, warm=warm)
        target = options.destination.with_name(options.destination.name + ".copy")
        copies.append(measured(partial(copy, files, nbytes, target, threads)))
        prepare(files, warm=warm)
        conversions.append(measured(partial(convert, options, console)))
    shutil.rmtree(options.destination)
    return copies, conversions, nbytes


def _described(cost: Cost) -> str:
    return f"{cost.wall:.2f} s (CPU {cost.cpu:.2f}, {format_bytes(cost.memory)})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="bench.convert"
    )
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("--format", default="int4")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--method")
    parser.add_argument("--report", nargs="+", default=["sample"], choices=list(EXTENTS))
    parser.add_argument("--num-threads", nargs="+", type=int, default=[os.cpu_count()])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="with the source in the page cache")
    parser.add_argument("--out", type=Path, help="directory to write and delete (default: beside the model)")
    args = parser.parse_args()
    out = args.out or args.model.with_name(args.model.name + ".converted")
    if out.exists():
        parser.error(f"--out: {out} already exists")
    size = sum(path.stat().st_size for path in sources(args.model))
    for report, threads in product(args.report, args.num_threads):
        options = Options(
            args.model, out, args.format, args.group_size, args.method, report=report, num_threads=threads
        )
        copies, conversions, nbytes = compare(options, args.rounds, threads, warm=args.warm)
        ratios = [made.wall / copied.wall for copied, made in zip(copies, conversions, strict=True)]
        copied, made = (Cost(*map(median, zip(*costs, strict=True))) for costs in (copies, conversions))
        print(
            f"{args.format} report={report} threads={threads}: {format_bytes(size)} -> "
            f"{format_bytes(nbytes)}, copying {_described(copied)}, converting {_described(made)}, "
            f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
