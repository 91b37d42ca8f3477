"""Checks options and required packages and chooses the directory, then runs a command."""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ktops.cli import processes
from ktops.cli.adapters import parse_weights
from ktops.cli.errors import Interrupted, UserError
from ktops.cli.finetune import options as options_file
from ktops.cli.finetune import run_directory
from ktops.cli.finetune.dataset_info import INFO
from ktops.cli.finetune.datasets import with_absolute_paths
from ktops.cli.finetune.options import Options
from ktops.cli.libraries import silence_transformers
from ktops.cli.models import find_model
from ktops.cli.packages import require_packages

COMPILED_PRODUCTS = 128
"""Shapes of matrix products that PyTorch and oneDNN keep compiled, 0.6 MiB each. Every length of a sequence
or a batch is another shape: their own limit of 1,024 would come to hundreds of MiB."""


def run_finetune(given: dict[str, Any]) -> None:
    """Runs `ktops finetune` with the options given on the command line.

    Other options come from the file ``config``, if it is given, have their defaults or, with ``resume``, the
    values from the original run.

    Raises:
        UserError, Interrupted: see finetune.finetune.
    """
    require_packages("accelerate", "matplotlib", "peft", "safetensors", "tokenizers", "transformers", "yaml")
    given = dict(given)
    file = given.pop("config", None)
    set_environment()
    with processes.together():
        if file is None:
            _run_finetune(given, [Path()], ())
            return
        from ktops.cli.finetune.config_file import read_config

        config = read_config(file)
        try:
            _run_finetune(config.with_command_line(given), [Path(), file.parent], config.notes)
        except UserError as error:
            raise UserError(config.explain(str(error), given)) from None


def _run_finetune(given: dict[str, Any], folders: list[Path], notes: Sequence[str]) -> None:
    """Runs `ktops finetune`; the data may be in any of the folders, and a dataset_info.json in the last."""
    output_dir, resume, overwrite = (
        given.pop("output_dir", None), given.pop("resume", False), given.pop("overwrite", False)
    )  # fmt: skip
    force = given.pop("force", False)
    output_dir = None if output_dir is None else Path(output_dir)

    def choose() -> tuple[Path, Options, list[str]]:
        _find_files(given, folders)
        if not resume:
            options = replace(options_file.complete(Options(**given)), world_size=processes.world_size())
            return run_directory.choose(output_dir, resume=False, overwrite=overwrite), options, []
        run_directory.require_last_checkpoint(resume, output_dir)
        directory = run_directory.choose(output_dir, resume=True, overwrite=overwrite)
        recorded = options_file.resumed(options_file.load(directory), given)
        _require_unfinished(directory, recorded)
        _require_same_pretraining(directory, recorded.world_size)
        return directory, *options_file.on_processes(recorded, processes.world_size())

    directory, options, more_notes = processes.on_main_process(choose)
    silence_transformers()
    if not processes.is_main_process():
        warnings.simplefilter("ignore")
    from ktops.cli.finetune.run import finetune

    console = Console(highlight=False, quiet=not processes.is_main_process())
    for note in [*notes, *more_notes]:
        console.print(f"  {note}", soft_wrap=True)
    try:
        finetune(options, directory, console, overwrite=overwrite, force=force)
    except KeyboardInterrupt:
        raise Interrupted("Interrupted.") from None


def _find_files(given: dict[str, Any], folders: list[Path]) -> None:
    """Replaces names of models and files by absolute paths, which --resume needs in another directory."""
    if given.get("model") is not None:
        given["model"] = find_model(str(given["model"]))
    described = [folder for folder in (folders[-1], Path("data")) if (folder / INFO).is_file()]
    if given.get("dataset_dir") is None and len(folders) > 1 and described:
        given["dataset_dir"] = described[0]
    for name in ("dataset_dir", "experts_path"):
        if given.get(name) is not None:
            given[name] = str(Path(given[name]).resolve())
    for name in ("data", "eval_data"):
        if given.get(name) is not None:
            given[name] = with_absolute_paths(str(given[name]), given.get("dataset_dir"), folders)


def run_convert(
    source: Path,
    destination: Path,
    weight_format: str,
    group_size: int | None,
    method: str | None,
    overwrite: bool,
    report: str,
    num_threads: int | None,
    force: bool,
) -> None:
    """Converts a checkpoint.

    Raises:
        UserError, Interrupted: see convert.convert.
    """
    require_packages("safetensors")
    options_file.require_settings("--weight-format", weight_format, group_size, method)
    from ktops.cli.conversion_report import EXTENTS
    from ktops.cli.convert import Options, convert

    if report not in EXTENTS:
        raise UserError(f"--report must be one of {', '.join(EXTENTS)}, got {report!r}")
    options = Options(
        source, destination, weight_format, group_size, method, overwrite, report, num_threads, force
    )
    convert(options, Console(highlight=False))


def run_plan(given: dict[str, Any]) -> None:
    """Runs `ktops plan` with its arguments.

    Raises:
        UserError: see plan.run.plan.
    """
    _prepare_inference()
    context, as_json = (given.pop(name) for name in ("context", "json"))
    given["world_size"] = given.pop("processes")
    for option, value in (("--context", context), ("--processes", given["world_size"])):
        if value < 1:
            raise UserError(f"{option} must be positive, got {value}")
    given["model"] = find_model(given["model"])
    from ktops.cli.plan.run import plan

    with _model_as_argument():
        plan(options_file.complete(Options(data="", **given)), context, as_json)


def run_chat(given: dict[str, Any]) -> None:
    """Runs `ktops chat` with the options given on the command line.

    Raises:
        UserError, Interrupted: see chat.chat.
    """
    _prepare_inference()
    from ktops.cli.chat.run import ChatOptions, chat

    with _model_as_argument():
        chat(ChatOptions.of(given))


def run_serve(given: dict[str, Any], arguments: list[str]) -> None:
    """Runs `ktops serve` with the options given on the command line, and those of ``transformers serve``.

    Raises:
        UserError: see serve.serve.
    """
    _prepare_inference()
    from ktops.cli.inference import LoadOptions
    from ktops.cli.serve import serve

    with _model_as_argument():
        serve(LoadOptions.of(given), arguments)


def set_environment() -> None:
    """Keeps libraries off the network, and limits COMPILED_PRODUCTS if none has been computed yet."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(COMPILED_PRODUCTS))


@contextmanager
def _model_as_argument() -> Iterator[None]:
    """Names the model in messages as commands do that take it as an argument, not as an option."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--model: ", "MODEL: ", 1)) from None


def _prepare_inference() -> None:
    """Checks for the packages that load a model, keeps them offline, and silences them."""
    require_packages("accelerate", "peft", "psutil", "safetensors", "tokenizers", "transformers")
    set_environment()
    silence_transformers()


def run_export(
    adapters: list[Path], destination: Path, layout: str, base: Path | None, weights: str | None
) -> None:
    """Exports adapters.

    Raises:
        UserError, Interrupted: see export.export.
    """
    require_packages("safetensors", "transformers")
    from ktops.cli.export import export

    export(adapters, destination, layout, base, parse_weights(weights), _quiet_console())


def run_merge(
    base: Path,
    adapters: list[Path],
    destination: Path,
    weights: str | None,
    weight_format: str | None,
    group_size: int | None,
    method: str | None,
) -> None:
    """Merges adapters into a model.

    Raises:
        UserError, Interrupted: see merge.merge.
    """
    require_packages("safetensors", "transformers")
    if weight_format is not None:
        options_file.require_settings("--weight-format", weight_format, group_size, method)
    elif group_size is not None or method is not None:
        raise UserError("--group-size and --quantize-method need --weight-format")
    from ktops.cli.merge import merge

    factors = parse_weights(weights)
    merge(base, adapters, destination, factors, weight_format, group_size, method, _quiet_console())


def _quiet_console() -> Console:
    """Silences transformers, and returns the console for the command's own output."""
    silence_transformers()
    return Console(highlight=False)


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


def _require_same_pretraining(directory: Path, world_size: int) -> None:
    begun = run_directory.last_checkpoint(directory / run_directory.PRETRAINING) is not None
    if begun and world_size != processes.world_size():
        raise UserError(
            f"--resume: the small model is being pretrained with batches for {world_size} processes, not "
            f"for {processes.world_size()}. Continue with {world_size}; after its pretraining, others can "
            "take over"
        )
