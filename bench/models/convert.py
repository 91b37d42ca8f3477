"""Compares `ktops convert` with reading and writing the same bytes alone, in turns.

Example:
    python -m bench.models convert MODEL SCRATCH --options --weight-format int4 --quantize-method mse

Before each of them, the source's pages are dropped from the cache. The bytes alone are read by one thread,
which then writes and synchronizes files of the result's sizes. SCRATCH gets the results, which are deleted.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.arguments import Parser
from bench.contest import ROOT
from bench.models.compare import print_table
from ktops._display import format_bytes

_CHUNK = 16 << 20


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _drop_from_cache(folder: Path) -> None:
    for file in _files(folder):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert(source: Path, out: Path, options: list[str]) -> tuple[float, float]:
    """Runs `ktops convert`; returns its seconds and CPU seconds.

    Raises:
        subprocess.CalledProcessError: the command failed; it has said why.
    """
    _drop_from_cache(source)
    paths = str(source.resolve()), str(out.resolve())
    command = [sys.executable, "-m", "ktops.cli.main", "convert", *paths, *options]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def read_and_write(source: Path, sizes: list[int], scratch: Path) -> tuple[float, float]:
    """Reads all bytes of the source and writes files of these sizes; returns seconds and CPU seconds."""
    _drop_from_cache(source)
    buffer = bytearray(_CHUNK)
    start, cpu = time.perf_counter(), time.process_time()
    for file in _files(source):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    for number, size in enumerate(sizes):
        with open(scratch / str(number), "wb", buffering=0) as opened:
            for begin in range(0, size, _CHUNK):
                opened.write(memoryview(buffer)[: size - begin])
            os.fsync(opened.fileno())
    return time.perf_counter() - start, time.process_time() - cpu


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("models convert", __doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model's directory")
    parser.add_argument("scratch", type=Path, metavar="SCRATCH", help="a directory on the same disk")
    parser.rounds(2)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=["--weight-format", "int4"],
                        help="of ktops convert (default: --weight-format int4)")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    out, bytes_alone = args.scratch / "converted", args.scratch / "bytes"
    samples: dict[str, list[tuple[float, float]]] = {"ktops convert": [], "bytes alone": []}
    for _ in range(args.rounds):
        try:
            samples["ktops convert"].append(convert(args.model, out, args.options))
            sizes = [file.stat().st_size for file in _files(out)]
            shutil.rmtree(out)
            bytes_alone.mkdir(parents=True)
            samples["bytes alone"].append(read_and_write(args.model, sizes, bytes_alone))
        finally:
            shutil.rmtree(bytes_alone, ignore_errors=True)
    read = sum(file.stat().st_size for file in _files(args.model))
    print(f"{' '.join(args.options)}: {format_bytes(read)} read, {format_bytes(sum(sizes))} written")
    figures = {name: tuple(map(statistics.median, zip(*rows, strict=True))) for name, rows in samples.items()}
    print_table(figures, ("seconds", "CPU seconds"))
    return 0
