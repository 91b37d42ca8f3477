"""Reads and writes bench/results, a file per bench, machine and ISA; describes the measured machine."""

import datetime
import json
import re
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import ktops
from bench.machine import Calibration, cpu_features, cpu_model, last_level_cache_bytes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def revision(root: Path = ROOT) -> str | None:
    """Returns the commit of the tree, with "+" if what is measured differs; None outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "ktops", "ktops_csrc")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine_record(calibration: Calibration) -> dict:
    """Returns CPU, versions, peak of all supported kernels and read bandwidth, for one and all threads.

    "peak_flop_per_second" is that of multiply-adds alone, "l2_flop_per_second" that of the same kernels with
    both operands from the second-level cache.
    """
    threads = sorted({1, calibration.num_threads})

    def peaks(from_l2: bool) -> dict[str, dict[str, float]]:
        return {
            f"{isa} {dtype}": {str(n): calibration.peak(isa, dtype, n, from_l2=from_l2) for n in threads}
            for isa, available in ktops.cpu_capabilities().items()
            if available
            for dtype in ("bfloat16", "float32")
        }

    return {
        "cpu": cpu_model(),
        "features": cpu_features(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "threads": calibration.num_threads,
        "ktops": ktops.__version__,
        "revision": revision(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "peft": _version("peft"),
        "peak_flop_per_second": peaks(from_l2=False),
        "l2_flop_per_second": peaks(from_l2=True),
        "read_bytes_per_second": {str(n): calibration.bandwidth(n) for n in threads},
    }


def result_file(bench: str, machine: dict, isa: str) -> Path:
    """Returns bench/results/<bench>-<cpu>-<threads>threads-<isa>.json."""
    cpu = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", "", machine["cpu"].lower())
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu).strip("-")
    return RESULTS / f"{bench}-{cpu}-{machine['threads']}threads-{isa}.json"


def _rounded(value):
    """Rounds all floats inside a value to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


def save(bench: str, machine: dict, isa: str, rows: list[dict], key: Callable[[dict], tuple]) -> Path:
    """Writes rows to the file of the bench. Rows with other keys stay, so a run may be partial.

    Every row records the revision that was measured.
    """
    file = result_file(bench, machine, isa)
    rows = [{**row, "revision": machine["revision"]} for row in rows]
    if file.exists():
        replaced = {key(row) for row in rows}
        rows = [row for row in json.loads(file.read_text())["rows"] if key(row) not in replaced] + rows
    write(file, {"bench": bench, "isa": isa, "machine": machine}, sorted(rows, key=key))
    return file


def write(file: Path, record: dict, rows: list[dict]) -> None:
    """Writes a record as JSON with its "rows" last, a row per line."""
    head = json.dumps(_rounded(record), indent=1).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(_rounded(row)) for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')


def save_by_isa(bench: str, machine: dict, rows: list[dict], key: Callable[[dict], tuple]) -> None:
    """Saves the rows of each ISA with :func:`save` and prints a line per file."""
    for isa in dict.fromkeys(row["isa"] for row in rows):
        file = save(bench, machine, isa, [row for row in rows if row["isa"] == isa], key)
        print(f"saved {file}")


def exit_status(rows: list[dict]) -> int:
    """Returns 1 if a row is wrong or too slow, else 3 if one never had a quiet sample, else 0."""
    statuses = {row["status"] for row in rows}
    return 1 if statuses & {"wrong", "slower"} else 3 if "busy" in statuses else 0


def load(bench: str, folder: Path | None = None, isa: str = "*") -> list[dict]:
    """Returns the contents of all files of a bench, or of one ISA, by name: {"bench", "isa", ...}."""
    files = sorted((folder or RESULTS).glob(f"{bench}-*-{isa}.json"))
    return [json.loads(file.read_text()) for file in files]
