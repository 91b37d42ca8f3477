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
    dataset_dir: str | None = None
    eval_data: str | None = None
    max_samples: int | None = None
    ignore_keys: str = ""
    eval_fraction: float | None = None
    eval_examples: int | None = None
    eval_steps: int | None = None
    max_steps: int | None = None
    epochs: float | None = None
    lora_rank: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target: str = "attention,experts"
    freeze_experts: bool = False
    learning_rate: float | None = None
    lr_scheduler: str = "cosine"
    warmup_ratio: float = 0.05
    warmup_steps: int | None = None
    optimizer: str = "adamw_torch_fused"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int | None = None
    eval_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    packing: bool = True
    max_length: int = 1024
    dtype: str = "bf16"
    device: str = "cpu"
    num_gpu_experts: int = 0
    experts_implementation: str = "ktops"
    experts_path: str | None = None
    mmap: bool = False
    linear_format: str | None = None
    weight_format: str | None = None
    group_size: int | None = None
    quantize_method: str | None = None
    num_threads: int | None = None
    logging_steps: int | None = None
    save_steps: int = 50
    save_total_limit: int | None = 1
    pretrain_steps: int | None = None
    seed: int = 0
    world_size: int = 1
    """Processes, each of which trains on batches of its own; no option of the command."""

    @property
    def is_demo(self) -> bool:
        return self.model is None

    @property
    def torch_dtype(self):
        import torch

        return {"bf16": torch.bfloat16, "f32": torch.float32}[self.dtype]


DEMO = {"max_steps": 200, "learning_rate": 1e-3, "batch_size": 16, "pretrain_steps": 450}
USER = {"epochs": 3.0, "learning_rate": 2e-4, "batch_size": 4}
EVAL_FRACTION = 0.05

EVALUATION = ("eval_fraction", "eval_examples", "eval_data")
"""Options of which one says what to evaluate on."""

SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt",
)  # fmt: skip
"""Schedules of transformers that need no further arguments."""

OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop")
"""Optimizers of transformers that run on the CPU and need no other package."""

_CHOICES = {"dtype": ("bf16", "f32"), "lr_scheduler": SCHEDULERS, "optimizer": OPTIMIZERS}

_POSITIVE = (
    "max_steps", "epochs", "lora_rank", "lora_alpha", "learning_rate", "batch_size", "eval_batch_size",
    "gradient_accumulation_steps", "max_length", "max_samples", "eval_examples", "eval_steps",
    "logging_steps", "save_steps", "save_total_limit", "num_threads", "adam_epsilon", "pretrain_steps",
)  # fmt: skip

_NOT_NEGATIVE = ("warmup_steps", "weight_decay", "max_grad_norm", "num_gpu_experts")

_BELOW_ONE = ("eval_fraction", "lora_dropout", "warmup_ratio", "adam_beta1", "adam_beta2")


def complete(options: Options) -> Options:
    """Checks the options and fills in those that are None.

    Raises:
        UserError: a value is out of range, or an option was given without the one it requires.
    """
    _require_model_and_data(options)
    defaults = DEMO if options.is_demo else USER
    if options.max_steps is None and options.epochs is not None:
        defaults = {name: value for name, value in defaults.items() if name != "max_steps"}
    open_: dict[str, Any] = {
        name: value for name, value in defaults.items() if getattr(options, name) is None
    }
    options = replace(options, **open_)
    if options.lora_alpha is None:
        options = replace(options, lora_alpha=2.0 * options.lora_rank)
    if all(getattr(options, name) is None for name in EVALUATION):
        options = replace(options, eval_fraction=EVAL_FRACTION)
    for name in _POSITIVE:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{flag(name)} must be positive, got {value}")
    for name in _NOT_NEGATIVE:
        value = getattr(options, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"{flag(name)} must not be negative, got {value}")
    for name in _BELOW_ONE:
        value = getattr(options, name)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"{flag(name)} must be at least 0 and below 1, got {value}")
    for name, choices in _CHOICES.items():
        if getattr(options, name) not in choices:
            *others, last = choices
            raise UserError(
                f"{flag(name)} must be {', '.join(others)} or {last}, got {getattr(options, name)!r}"
            )
    if options.eval_steps is not None and options.eval_fraction == 0:
        raise UserError("--eval-steps needs held-out examples, got --eval-fraction 0")
    if options.num_gpu_experts and options.device == "cpu":
        raise UserError("--num-gpu-experts needs --device")
    _require_format(options)
    return options


def flag(name: str) -> str:
    """Returns an option's name on the command line."""
    return "--" + name.replace("_", "-")


def _require_model_and_data(options: Options) -> None:
    if (options.model is None) != (options.data is None):
        given, missing = ("--model", "--data") if options.data is None else ("--data", "--model")
        raise UserError(f"{given} needs {missing}. Without both, ktops creates a small model and its data")
    if options.pretrain_steps is not None and not options.is_demo:
        raise UserError("--pretrain-steps is only for the small model; ktops does not pretrain your --model")
    for name in ("eval_data", "dataset_dir", "max_samples", "experts_path", "mmap", "linear_format"):
        if getattr(options, name) not in (None, False) and options.is_demo:
            raise UserError(f"{flag(name)} needs --model and --data")
    given_evaluation = [flag(name) for name in EVALUATION if getattr(options, name)]
    if len(given_evaluation) > 1:
        raise UserError(f"{' and '.join(given_evaluation)} cannot be combined")


def _require_format(options: Options) -> None:
    require_linear_format(options.linear_format)
    for name in ("weight_format", "experts_path", "mmap"):
        if getattr(options, name) not in (None, False) and options.experts_implementation != "ktops":
            raise UserError(
                f"{flag(name)} needs --experts-implementation ktops, got {options.experts_implementation}"
            )
    if options.mmap and options.weight_format is not None:
        raise UserError(
            "--mmap uses the experts as the files hold them, so it cannot be combined with --weight-format"
        )
    if options.weight_format is None:
        for name in ("group_size", "quantize_method"):
            if getattr(options, name) is not None:
                raise UserError(f"{flag(name)} needs --weight-format")
        return
    require_settings("--weight-format", options.weight_format, options.group_size, options.quantize_method)


def require_linear_format(linear_format: str | None) -> None:
    """Raises UserError for an unknown format of linear layers."""
    from ktops.integrations.linear_format import LINEAR_FORMATS

    if linear_format not in (None, *LINEAR_FORMATS):
        raise UserError(f"--linear-format must be {' or '.join(LINEAR_FORMATS)}, got {linear_format!r}")


def require_settings(option: str, weight_format: str, group_size: int | None, method: str | None) -> None:
    """Raises UserError for an unknown weight format, or a group size or method that it does not support."""
    from ktops.formats import get_format

    try:
        get_format(weight_format).check_settings(group_size, method or "rtn")
    except ValueError as error:
        raise UserError(f"{option} {weight_format}: {error}") from None


def save(options: Options, directory: Path) -> None:
    from ktops.checkpoints.stream import write_json

    write_json(directory / FILE, asdict(options))


def load(directory: Path) -> Options:
    """Loads the options of the run in a directory.

    Raises:
        UserError: the directory holds no run, or its file is damaged.
    """
    path = directory / FILE
    if not path.is_file():
        raise UserError(f"--resume: no run in {directory} ({FILE} is missing)")
    known = {field.name for field in fields(Options)}
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--resume: {path} is not JSON: {error}") from None
    return Options(**{name: value for name, value in recorded.items() if name in known})


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
                f"--resume: {flag(name)} is {is_what} in the run to resume and can't be "
                f"changed to {value}. Leave it out, or start another run"
            )
    return replace(recorded, max_steps=given.get("max_steps", recorded.max_steps))


def on_processes(recorded: Options, count: int) -> tuple[Options, list[str]]:
    """Returns the options to continue a run with another number of processes, and what to say about it.

    A step keeps its examples, by another number of batches for each process.

    Raises:
        UserError: the batches of a step cannot be divided among the processes.
    """
    if count == recorded.world_size:
        return recorded, []
    batches = recorded.gradient_accumulation_steps * recorded.world_size
    if batches % count:
        raise UserError(
            f"--resume: a step of this run has {batches} batches ({_processes(recorded.world_size)}, "
            f"--gradient-accumulation-steps {recorded.gradient_accumulation_steps}), which "
            f"{_processes(count)} cannot share equally. Use a number of processes that divides {batches}"
        )
    options = replace(recorded, gradient_accumulation_steps=batches // count, world_size=count)
    dropout = ", but dropout leaves out others" if recorded.lora_dropout else ""
    return options, [
        f"{_processes(count)} instead of {recorded.world_size}: each takes {batches // count} batches of "
        f"{recorded.batch_size} in a step, which has the same examples as before{dropout}"
    ]


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
