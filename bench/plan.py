"""Compares the memory that ktops plans for a command with what its process then uses.

    python -m bench.plan finetune --model DIR --data FILE --batch-size 2 --max-steps 3
    python -m bench.plan chat DIR --prompt Hello
    python -m bench.plan convert DIR OUT --weight-format int4

Runs `ktops` with these arguments and prints, in MiB: planned, the anonymous memory in its first lines;
anonymous, the highest while it ran; files, the highest of mapped files, libraries included.

Exit status: that of the command, or 1 if the plan is off by more than a tenth.
"""

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SECONDS = 0.002
"""Between two looks at the process. The largest tensors live longer."""

START = "from ktops.cli.main import main; main()"
UNITS = {"KiB": 2**-10, "MiB": 1, "GiB": 2**10}


@dataclass(frozen=True)
class Usage:
    """Memory of a command in MiB; ``output`` is what it printed."""

    status: int
    planned: float
    anonymous: float
    files: float
    output: str

    @property
    def ratio(self) -> float:
        """What was planned, as a fraction of what was used."""
        return self.planned / self.anonymous


def measure(*arguments: object) -> Usage:
    """Runs `ktops` in a process of its own.

    Raises:
        ValueError: the command printed no plan.
    """
    command = [sys.executable, "-c", START, *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    ) as process:
        anonymous = files = 0.0
        while process.poll() is None:
            sizes = _resident(process.pid)
            anonymous, files = max(anonymous, sizes.get("Anon", 0)), max(files, sizes.get("File", 0))
            time.sleep(SECONDS)
        assert process.stdout is not None
        output = process.stdout.read()
    found = re.search(r"plan: .*?; memory ([\d.]+) (\w+)", output)
    if found is None:
        raise ValueError(f"no plan in the output of {arguments[0]}:\n{output}")
    planned = float(found[1]) * UNITS[found[2]]
    written = re.search(r"adapter, metrics.json and loss.png: (.*)", output)
    if written is not None:  # with more digits
        metrics = json.loads(Path(written[1], "metrics.json").read_text(encoding="utf-8"))
        planned = metrics["plan"]["anonymous_bytes"] / 2**20
    return Usage(process.returncode, planned, anonymous, files, output)


def _resident(pid: int) -> dict[str, float]:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {name: int(size) / 1024 for name, size in re.findall(r"Rss(Anon|File):\s+(\d+)", status)}


def main(argv: list[str]) -> int:
    usage = measure(*argv)
    print(usage.output)
    print(f"{'planned':>10} {'anonymous':>10} {'files':>10} {'ratio':>6}")
    print(f"{usage.planned:10.1f} {usage.anonymous:10.1f} {usage.files:10.1f} {usage.ratio:6.2f}")
    return usage.status or int(abs(usage.ratio - 1) > 0.1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
