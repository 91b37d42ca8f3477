"""Collects the figures of all answers, and writes them to a file after each."""

from dataclasses import asdict, fields
from pathlib import Path

import psutil
import torch

import ktops
from ktops.checkpoints.stream import write_json
from ktops.cli.chat.conversation import Answer
from ktops.cli.errors import UserError
from ktops.cli.finetune.measure import count_weights, peak_rss_bytes
from ktops.cli.inference import Loaded, LoadOptions
from ktops.cli.versions import versions


def rss_bytes() -> int:
    """Returns the resident memory of this process, with the pages of mapped files."""
    return psutil.Process().memory_info().rss


class Metrics:
    """The figures of a run of `ktops chat`.

    Args:
        options: those of the run; ``metrics`` names the file, if there is to be one.
        loaded: the model.
    """

    def __init__(self, options, loaded: Loaded) -> None:
        self.file: Path | None = options.metrics
        self.answers: list[Answer] = []
        self.contents = {
            "versions": versions(),
            "cpu_capability": ktops.cpu_capability(),
            "num_threads": torch.get_num_threads(),
            "options": {field.name: getattr(options, field.name) for field in fields(LoadOptions)},
            "parameters": count_weights(loaded.model),
            "load_seconds": round(loaded.seconds, 3),
        }

    def add(self, answer: Answer) -> None:
        """Adds an answer, and replaces the file.

        Raises:
            UserError: the file cannot be written.
        """
        self.answers.append(answer)
        if self.file is None:
            return
        try:
            write_json(self.file, self._collect())
        except OSError as error:
            raise UserError(f"--metrics: {error.filename}: {error.strerror}") from None

    def _collect(self) -> dict:
        return {
            **self.contents,
            "answers": [
                {
                    **asdict(answer),
                    "prompt_tokens_per_second": answer.prompt_tokens_per_second,
                    "answer_tokens_per_second": answer.answer_tokens_per_second,
                    "kt_share": answer.kt_share,
                }
                for answer in self.answers
            ],
            "rss_bytes": rss_bytes(),
            "peak_rss_bytes": peak_rss_bytes(),
        }
