"""Runs `ktops finetune` and times a large matrix product after every step, in the same state of the machine.

python -m bench.models.finetune FIGURES ARGUMENTS OF ktops finetune

The seconds of the products go to the file FIGURES; metrics.json in the run's directory has all others.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainerCallback, trainer

from bench.contest import ROOT

_SIZE = 4096
_METRICS = "metrics.json"


class _Products(TrainerCallback):
    """Times a product of two bfloat16 matrices of 4096 x 4096, outside the time of the steps."""

    seconds: list[float] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.a, self.b, self.out = torch.randn(3, _SIZE, _SIZE).bfloat16()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in (logs or {}):
            start = time.perf_counter()
            torch.mm(self.a, self.b, out=self.out)
            _Products.seconds.append(time.perf_counter() - start)


@dataclass(frozen=True)
class Run:
    """A finished run: its metrics.json, and the speed of the products after its steps."""

    metrics: dict
    product_seconds: list[float]

    @property
    def step_seconds(self) -> list[float]:
        """The seconds of each step but the first, which is slower."""
        return [step["seconds"] for step in self.metrics["steps"]][1:]

    @property
    def kt_seconds(self) -> float:
        """Mean seconds of a step inside kt ops."""
        ops = self.metrics["kt_time"]["ops"].values()
        return sum(op["seconds"] for op in ops) / len(self.metrics["steps"])

    @property
    def flops_per_second(self) -> list[float]:
        return [2 * _SIZE**3 / seconds for seconds in self.product_seconds[1:]]


def write_data(file: Path, tokens: int, examples: int) -> None:
    """Writes texts of more than ``tokens`` tokens, to be cut to that length."""
    from ktops.cli.finetune import corpus

    text = " ".join(corpus.stories(max(tokens // 4, 50)))
    size = tokens * 12
    texts = [(text * (1 + size // len(text)))[number : number + size] for number in range(examples)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run(model: Path, tokens: int, steps: int, scratch: Path, *options: str) -> Run:
    """Runs `ktops finetune` in a process of its own, on one sequence of ``tokens`` tokens per step.

    Raises:
        subprocess.CalledProcessError: the command failed; it has said why.
    """
    data, out, figures = scratch / f"{tokens}.jsonl", scratch / "run", scratch / "products.json"
    write_data(data, tokens, steps)
    command = [
        *("--model", model.resolve(), "--data", data, "--output-dir", out, "--overwrite"),
        *("--max-length", tokens),
        *("--batch-size", 1, "--max-steps", steps, "--eval-fraction", 0, *options),
    ]
    process = [sys.executable, "-m", "bench.models.finetune", figures, "finetune", *command]
    subprocess.run(list(map(str, process)), cwd=ROOT, check=True, stdout=sys.stderr)
    return Run(json.loads((out / _METRICS).read_text()), json.loads(figures.read_text()))


if __name__ == "__main__":
    from ktops.cli.main import main

    figures = Path(sys.argv.pop(1))
    trainer.DEFAULT_CALLBACKS.append(_Products)
    main_status = 0
    try:
        main()
    except SystemExit as end:
        main_status = int(end.code or 0)
    figures.write_text(json.dumps(_Products.seconds))
    sys.exit(main_status)
