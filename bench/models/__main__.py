"""Whole models at their real size: ``python -m bench.models COMMAND ... (--help for its options)``.

make     write a model with random weights, as it would be published
step     compare a training step with the sum of its parts
table    what real models need on disk and in memory
compare  compare answers with llama.cpp, and training with PEFT on transformers' grouped_mm
"""

import sys

from bench.models import compare, make, step, table

COMMANDS = {"make": make.main, "step": step.main, "compare": compare.main, "table": table.main}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        print(__doc__, end="")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    return COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
