"""Tests ktops on a CUDA machine, in less than six minutes: results, copies, streams, graphs, models, times.

Builds the extension in place and needs what the tests need, with a torch for CUDA:

    pip install torch==2.13.0 setuptools wheel ninja && pip install --no-build-isolation -e '.[test]'
    python test/devices/run_on_gpu.py

Prints a line per check, the reasons of failures, and Markdown tables with the figures for
docs/performance.md. Words select checks: ``run_on_gpu.py graphs models``. The GPU is the first of
CUDA_VISIBLE_DEVICES.

Exit status: 0 if every check passed, 1 if not or if the time was up, 2 without a GPU that torch can use.
"""

import argparse
import faulthandler
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
HANGING = 60
"""Seconds after the limit at which the stacks of all threads are printed and the process ends."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="run only checks with one of these words")
    parser.add_argument("--minutes", type=float, default=5, help="begin no check later (default: 5)")
    options = parser.parse_args()
    clock = time.perf_counter
    deadline = clock() + 60 * options.minutes
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print(f"torch {torch.__version__} finds no CUDA device: nothing was tested", file=sys.stderr)
        return 2
    faulthandler.dump_traceback_later(60 * options.minutes + HANGING, exit=True)
    environment = {"MAX_JOBS": str(os.cpu_count()), **os.environ}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=ROOT, env=environment, check=True)
    sys.path[:0] = [str(ROOT), str(ROOT / "test/integrations")]
    from gpu.runtime import Cuda

    return run(Cuda(clock), options.words, clock, deadline)


def run(runtime, words: list[str], clock: Callable[[], float], deadline: float = math.inf) -> int:
    """Runs the checks that contain one of the words, or all; returns the exit status.

    Args:
        runtime: a gpu.runtime.Runtime; checks for which it lacks a feature are left out.
        deadline: the time of the clock after which no check begins.
    """
    import gpu.every_check  # noqa: F401  (defines the checks)
    from gpu.checks import CHECKS, run_checks, tables

    import ktops
    from bench.machine import cpu_model

    machine = {
        "device": runtime.name, "CPU": cpu_model(), "threads": torch.get_num_threads(),
        "kernels": ktops.cpu_capability(), "torch": torch.__version__, "ktops": ktops.__version__,
    }  # fmt: skip
    print("\n".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    ktops.enable()
    chosen = [
        one
        for one in CHECKS
        if one.needs <= runtime.features and (not words or any(word in one.name for word in words))
    ]
    outcomes = []
    for outcome in run_checks(runtime, chosen, clock, deadline):
        print(outcome.line(), *filter(None, [outcome.error]), sep="\n", flush=True)
        outcomes.append(outcome)
    print(tables(outcomes))
    passed = sum(outcome.result == "pass" for outcome in outcomes)
    print(f"\n{passed} of {len(chosen)} checks passed on {runtime.name}")
    return 0 if passed == len(chosen) > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
