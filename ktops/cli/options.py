"""The settings of a `ktops finetune` run."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ktops.cli.errors import UserError

FILE = "options.json"


@dataclass(frozen=True)
class Options:
    """Everything that determines the result of a run; written to ``options.json`` so that it can be resumed.

    None means a value that depends on others; see :func:`complete`.
    """

    model: str | None = None
    data: str | None = None
    ignore_keys: str = ""
    eval_fraction: float = 0.05
    max_steps: int | None = None
    epochs: float | None = None
    lora_rank: int = 16
    lora_alpha: float | None = None
    target: str = "attention,experts"
    learning_rate: float | None = None
    batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    max_length: int = 1024
    dtype: str = "bf16"
    experts_implementation: str = "ktops"
    weight_format: str | None = None
    group_size: int | None = None
    quantize_method: str | None = None
    save_steps: int = 50
    pretrain_steps: int | None = None
    seed: int = 0

    @property
    def is_demo(self) -> bool:
        return self.model is None

    @property
    def torch_dtype(self):
        import torch

        return {"bf16": torch.bfloat16, "f32": torch.float32}[self.dtype]


DEMO = {"max_steps": 200, "learning_rate": 1e-3, "batch_size": 16, "pretrain_steps": 450}
USER = {"epochs": 3.0, "learning_rate": 2e-4, "batch_size": 4}


def complete(options: Options) -> Options:
    """Checks the options and fills in those that are None.

    Raises:
        UserError: a value is out of range, or an option was given without the one it requires.
    """
    if (options.model is None) != (options.data is None):
        given, missing = ("--model", "--data") if options.data is None else ("--data", "--model")
        raise UserError(f"{given} needs {missing}. Without both, ktops creates a small model and its data")
    if options.pretrain_steps is not None and not options.is_demo:
        raise UserError("--pretrain-steps is only for the small model; ktops does not pretrain your --model")
    defaults = DEMO if options.is_demo else USER
    if options.max_steps is None and options.epochs is not None:
        defaults = {name: value for name, value in defaults.items() if name != "max_steps"}
    open_: dict[str, Any] = {
        name: value for name, value in defaults.items() if getattr(options, name) is None
    }
    options = replace(options, **open_)
    if options.lora_alpha is None:
        options = replace(options, lora_alpha=2.0 * options.lora_rank)
    for name in ("max_steps", "epochs", "lora_rank", "learning_rate", "batch_size", "pretrain_steps"):
        _require_positive(name, getattr(options, name))
    for name in ("lora_alpha", "gradient_accumulation_steps", "max_length", "save_steps"):
        _require_positive(name, getattr(options, name))
    if not 0 < options.eval_fraction < 1:
        raise UserError(f"--eval-fraction must be between 0 and 1, got {options.eval_fraction}")
    if options.dtype not in ("bf16", "f32"):
        raise UserError(f"--dtype must be bf16 or f32, got {options.dtype!r}")
    _require_format(options)
    return options


def _require_format(options: Options) -> None:
    if options.weight_format is None:
        for name in ("group_size", "quantize_method"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} needs --weight-format")
        return
    if options.experts_implementation != "ktops":
        raise UserError(
            f"--weight-format needs --experts-implementation ktops, got {options.experts_implementation}"
        )
    require_settings("--weight-format", options.weight_format, options.group_size, options.quantize_method)


def require_settings(option: str, weight_format: str, group_size: int | None, method: str | None) -> None:
    """Raises UserError for an unknown weight format, or a group size or method that it does not support."""
    from ktops.formats import get_format

    try:
        get_format(weight_format).check_settings(group_size, method or "rtn")
    except ValueError as error:
        raise UserError(f"{option} {weight_format}: {error}") from None


def _require_positive(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise UserError(f"--{name.replace('_', '-')} must be positive, got {value}")


def save(options: Options, directory: Path) -> None:
    (directory / FILE).write_text(json.dumps(asdict(options), indent=2) + "\n", encoding="utf-8")


def load(directory: Path) -> Options:
    """Loads the options of the run in a directory.

    Raises:
        UserError: the directory holds no run.
    """
    path = directory / FILE
    if not path.is_file():
        raise UserError(f"--resume: no run in {directory} ({FILE} is missing)")
    known = {field.name for field in fields(Options)}
    return Options(**{k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k in known})


def resumed(recorded: Options, given: dict[str, Any]) -> Options:
    """Returns the options to continue a run with: the recorded ones, with any ``--max-steps`` given now.

    Raises:
        UserError: another option was given with a value that differs from the recorded one.
    """
    for name, value in given.items():
        known = getattr(recorded, name)
        if name != "max_steps" and value != known:
            is_what = "not given" if known in (None, "") else known
            raise UserError(
                f"--resume: --{name.replace('_', '-')} is {is_what} in the run to resume and can't be "
                f"changed to {value}. Leave it out, or start another run"
            )
    return replace(recorded, max_steps=given.get("max_steps", recorded.max_steps))
