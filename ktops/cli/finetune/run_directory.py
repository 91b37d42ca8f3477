"""Chooses and prepares the directory of a run."""

import json
import shutil
from pathlib import Path

from ktops.cli.errors import UserError
from ktops.cli.finetune import options as options_file

DEFAULT = Path("ktops-finetune")
CHECKPOINTS, PRETRAINING, BASE = "checkpoints", "pretraining", "base"
OWN = (
    CHECKPOINTS,
    PRETRAINING,
    BASE,
    options_file.FILE,
    "metrics.json",
    "loss.png",
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
)
"""Everything a run writes to its directory; --overwrite deletes only these."""


def choose(output_dir: Path | None, resume: bool, overwrite: bool) -> Path:
    """Returns the directory of this run, without changing anything.

    If a directory named by the user already holds a run, --resume or --overwrite must specify what to do with
    it. The default directory is one of ktops-finetune, ktops-finetune-2, -3, ...: the first unused one for a
    new run, the last one with a run for --resume or --overwrite.

    Raises:
        UserError: the directory holds a run but should not, or holds none but should.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite cannot be combined")
    if output_dir is None:
        output_dir = _default(resume or overwrite)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output-dir: {output_dir} is not a directory")
    if resume and not holds_run(output_dir):
        raise UserError(f"--resume: no run in {output_dir}")
    if not resume and not overwrite and holds_run(output_dir):
        raise UserError(
            f"--output-dir: {output_dir} already holds a run. Add --resume to continue it, --overwrite to "
            "replace it, or choose another directory"
        )
    return output_dir


def prepare(directory: Path, overwrite: bool) -> None:
    """Creates the directory; with ``overwrite``, deletes the run in it (and no other file)."""
    for name in OWN if overwrite else ():
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir: {directory} cannot be created: {error.strerror}") from None


def holds_run(directory: Path) -> bool:
    return any((directory / name).exists() for name in OWN if name != "README.md")


def require_last_checkpoint(wanted: bool | str, output_dir: Path | None) -> None:
    """Raises UserError if ``resume_from_checkpoint`` names another checkpoint than the run's last one."""
    if isinstance(wanted, bool):
        return
    last = last_checkpoint((output_dir or DEFAULT) / CHECKPOINTS)
    if last is None or Path(wanted).resolve() != last.resolve():
        raise UserError(
            f"--resume: {wanted} is not the last checkpoint of the run in {output_dir or DEFAULT}"
            + (f", which is {last}" if last else ", which has none")
        )


def last_checkpoint(directory: Path) -> Path | None:
    """Returns the latest complete checkpoint-N in a directory."""
    complete = [path.parent for path in directory.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def _is_json(path: Path) -> bool:
    """Returns whether a file is complete; Trainer writes its state last, but not all at once."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _default(existing: bool) -> Path:
    last, candidate, number = None, DEFAULT, 2
    while holds_run(candidate):
        last, candidate, number = candidate, DEFAULT.with_name(f"{DEFAULT.name}-{number}"), number + 1
    return last if existing and last is not None else candidate
