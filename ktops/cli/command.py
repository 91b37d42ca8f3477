"""Checks options and required packages and chooses the directory, then runs a command."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from ktops.cli import options as options_file
from ktops.cli import run_directory
from ktops.cli.errors import Interrupted, UserError
from ktops.cli.options import Options
from ktops.cli.packages import require_packages


def run_finetune(given: dict[str, Any]) -> None:
    """Runs `ktops finetune` with the options given on the command line.

    Other options have their defaults or, with ``resume``, the values from the original run.

    Raises:
        UserError, Interrupted: see finetune.finetune.
    """
    require_packages("accelerate", "matplotlib", "peft", "safetensors", "tokenizers", "transformers")
    given = dict(given)
    output_dir, resume, overwrite = (
        given.pop("output_dir", None), given.pop("resume", False), given.pop("overwrite", False)
    )  # fmt: skip
    for name in ("model", "data"):
        if given.get(name) is not None:
            given[name] = str(Path(str(given[name])).resolve())
    if resume:
        directory = run_directory.choose(output_dir, resume=True, overwrite=overwrite)
        options = options_file.resumed(options_file.load(directory), given)
        _require_unfinished(directory, options)
    else:
        options = options_file.complete(Options(**given))
        directory = run_directory.choose(output_dir, resume=False, overwrite=overwrite)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from ktops.cli.finetune import finetune

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    set_verbosity_error()
    disable_progress_bar()

    try:
        finetune(options, directory, Console(highlight=False), overwrite=overwrite)
    except KeyboardInterrupt:
        raise Interrupted("Interrupted.") from None


def run_convert(
    source: Path,
    destination: Path,
    weight_format: str,
    group_size: int | None,
    method: str | None,
    overwrite: bool,
) -> None:
    """Converts a checkpoint.

    Raises:
        UserError, Interrupted: see convert.convert.
    """
    require_packages("safetensors")
    options_file.require_settings("--format", weight_format, group_size, method)
    from ktops.cli.convert import Options, convert

    options = Options(source, destination, weight_format, group_size, method, overwrite)
    convert(options, Console(highlight=False))


def _require_unfinished(directory: Path, options: Options) -> None:
    metrics = directory / "metrics.json"
    if not metrics.is_file():
        return
    done = json.loads(metrics.read_text(encoding="utf-8"))["steps"][-1]["step"]
    if options.max_steps is None or options.max_steps <= done:
        raise UserError(
            f"--resume: the run in {directory} is complete after {done} steps. To continue it, increase "
            "--max-steps"
        )
