"""Tells whether kt operators ran in a process; Python runs this at the start if the folder is in PYTHONPATH.

When the process ends, a line with its command goes to the file named by KT_WITNESS if an operator ran.
"""

import atexit
import os
import sys


def tell() -> None:
    if "ktops" in sys.modules:
        stats = sys.modules["ktops"].memory_stats()
        if stats["allocations"]:
            with open(os.environ["KT_WITNESS"], "a", encoding="utf-8") as file:
                file.write(" ".join(sys.argv) + "\n")


atexit.register(tell)
