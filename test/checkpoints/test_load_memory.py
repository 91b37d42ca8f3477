"""Reading takes the memory of the result, and less than that of two experts besides; converting only that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny_checkpoints import write_per_expert
from tiny_schemes import awq, fp8_channel, gptq, plain

NUM_EXPERTS = 8
SIZES = {"num_experts": NUM_EXPERTS, "hidden": 1024, "intermediate": 1024, "layers": 1}
WEIGHTS = 3 * 1024 * 1024

# What is freed goes back to the system at once (MALLOC_MMAP_THRESHOLD_), so that a case does not use what the
# one before it has left.
PROGRAM = """
import json
import os
import sys
from bench.memory import reset_peak, resident_bytes
import torch, ktops
from ktops.checkpoints import open_checkpoint

torch.set_num_threads(1)
ktops.quantize(torch.ones(1, 128, 1024), "int4", group_size=32)
for path, weight_format in json.loads(sys.argv[1]):
    (layer,) = open_checkpoint(path).layers
    options = {"weight_format": weight_format, "group_size": 32} if weight_format else {}
    layer.experts(**options)
    before = resident_bytes()
    reset_peak()
    read = layer.read(**options)
    size = read.gate_up_proj.nbytes + read.down_proj.nbytes
    print(resident_bytes(peak=True) - before, size)
    del read
"""


def repeated(make):
    """One matrix for all: making random ones is what takes the time."""
    made = {}

    def remembered(rng, rows, columns):
        key = rows, columns
        if key not in made:
            made[key] = make(rng, rows, columns)
        tensors, dense = made[key]
        return {name: tensor.clone() for name, tensor in tensors.items()}, dense[:1, :1]

    return remembered


CASES = {
    "bf16": (plain(torch.bfloat16), "", 2),
    "fp8": (fp8_channel, "", 1),
    "gptq": (gptq, "", 0.5),
    "awq": (awq, "", 0.5),
    "bf16 to int4": (plain(torch.bfloat16), "int4", 2),
}
"""name -> (make, the format asked for, bytes of a weight in the checkpoint)"""


def test_peak(tmp_path):
    arguments = []
    for case, (make, weight_format, _) in CASES.items():
        folder = tmp_path / case
        folder.mkdir()
        write_per_expert(folder, repeated(make), **SIZES)
        arguments.append((str(folder), weight_format))
    command = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert result.returncode == 0, result.stderr
    lines = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    besides = {}
    for (grown, size), (case, (_, _, bytes_per_weight)) in zip(lines, CASES.items(), strict=True):
        assert size > WEIGHTS * NUM_EXPERTS / 2
        besides[case] = (grown - size) / (WEIGHTS * bytes_per_weight)
    assert max(besides.values()) < 2, besides


CONVERT = """
import os
import sys
import threading
import time
from pathlib import Path
import torch
from rich.console import Console
from ktops.cli.convert import Options, convert

torch.set_num_threads(1)
peak, done = 0, threading.Event()

def anonymous():
    line, = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

source, small, folder = map(Path, sys.argv[1:])
with open(os.devnull, "w") as file:
    convert(Options(small, folder / "first", "int4"), Console(file=file))
    before, watcher = anonymous(), threading.Thread(target=watch)
    watcher.start()
    convert(Options(source, folder / "second", "int4"), Console(file=file))
done.set()
watcher.join()
print(peak - before)
"""


def test_peak_of_convert(tmp_path):
    """Two experts in bf16; mapped pages of files do not count, since the system can drop them."""
    size = 1024
    for name, sizes in (("source", (size, size)), ("small", (64, 64))):
        (tmp_path / name).mkdir()
        hidden, intermediate = sizes
        write_per_expert(
            tmp_path / name, repeated(plain(torch.bfloat16)), num_experts=2, layers=1, hidden=hidden,
            intermediate=intermediate,
        )  # fmt: skip
    command = [sys.executable, "-c", CONVERT, *(str(tmp_path / name) for name in ("source", "small", ""))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert 0 < int(result.stdout.split()[-1]) < 2 * 3 * size * size * 2, result.stdout
