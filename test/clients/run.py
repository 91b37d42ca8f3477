"""Tests ktops with clients from the package index.

Each client has an environment (environments.py), in which pytest runs the files of its tests. Without names,
all are tested. Needs what building ktops needs, and pip's package index. Arguments after -- go to pytest:

    python test/clients/run.py
    python test/clients/run.py trl llamafactory -- -m ci
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import CLIENTS, ROOT, build_wheel, python_of


def main() -> int:
    arguments = [*sys.argv[1:], "--"]
    end = arguments.index("--")
    own, to_pytest = arguments[:end], arguments[end + 1 : -1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLIENTS)}")
    parser.add_argument("--wheel", type=Path, help="the wheel of ktops to test (default: build one)")
    options = parser.parse_args(own)
    if unknown := set(options.names) - set(CLIENTS):
        parser.error(f"no client {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}")
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel or build_wheel(Path(folder))
        failed = [name for name in options.names or CLIENTS if not passes(name, wheel.resolve(), to_pytest)]
    print("failed: " + ", ".join(failed) if failed else "all passed")
    return 1 if failed else 0


def passes(name: str, wheel: Path, to_pytest: list[str]) -> bool:
    """Runs the tests of a client in its environment."""
    print(f"== {name}", flush=True)
    python = python_of(name, wheel)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    files = sorted(ROOT.glob(f"test/clients/test_{name}*.py"))
    command = [python.parent / "pytest", *files, *to_pytest]
    return subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
