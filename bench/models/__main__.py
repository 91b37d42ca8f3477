"""Whole models at their real size: ``python -m bench.models COMMAND ... (--help for its options)``.

make     write a model with random weights, as it would be published
step     compare a training step with the sum of its parts
table    what real models need on disk and in memory
convert  compare `ktops convert` with reading and writing the bytes alone
decode   compare what a token of an answer takes with and without an adapter
compare  compare answers with llama.cpp, and training with PEFT on transformers' grouped_mm
"""

import importlib
import subprocess
import sys

from bench.contest import ContestError

COMMANDS = ("make", "step", "table", "convert", "decode", "compare")


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        print(__doc__, end="")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        return importlib.import_module(f"bench.models.{argv[0]}").main(argv[1:])
    except ContestError as error:
        print(f"error: {error}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd)} ended with status {error.returncode}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
