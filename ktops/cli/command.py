"""What `ktops finetune` does before it starts: the directory, the options, the console."""

import os
import warnings
from pathlib import Path

from rich.console import Console

from ktops.cli import options as options_file
from ktops.cli import run_directory
from ktops.cli.options import Options


def run_finetune(given: dict[str, object]) -> None:
    """Runs a fine-tuning with the options given on the command line; the others have their defaults or, with
    ``resume``, the values that the run to be resumed had.

    Raises:
        UserError, Interrupted: see finetune.finetune.
    """
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

    finetune(options, directory, Console(highlight=False))
