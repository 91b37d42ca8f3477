"""Loads a model to answer with: from its directory, with an adapter, with the experts in a weight format."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ktops._display import format_bytes
from ktops.cli import trained
from ktops.cli.errors import UserError
from ktops.cli.finetune.measure import count_weights
from ktops.cli.finetune.options import flag, require_linear_format, require_settings
from ktops.cli.models import (
    check_directory,
    find_model,
    load_base,
    load_tokenizer,
    place,
    quantize_linear,
    reads_experts,
    require_device,
)
from ktops.cli.plan.run import check_chat
from ktops.formats import ExpertWeight
from ktops.integrations.freeze_adapters import freeze_adapters
from ktops.integrations.settings import set_num_threads
from ktops.integrations.transformers.coverage import experts_outside_op

Options = TypeVar("Options", bound="LoadOptions")

Say = Callable[[str], object]
"""Takes a line for the user."""

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class LoadOptions:
    """What to load, and how.

    Attributes:
        model: directory of a model, a name in the cache of the Hugging Face Hub, or directory of an adapter
            that names its model.
        adapter: directory of an adapter for the model.
        experts_path, weight_format, group_size, quantize_method: as for `ktops finetune`. If none is given,
            an adapter of `ktops finetune` gets the experts that it was trained on.
        mmap: as for `ktops finetune`.
        linear_format: of linear layers outside the experts, as for :func:`ktops.quantize_linear`.
        dtype: "bf16" or "f32"; None for that of the adapter's training, or else bf16.
        device, num_gpu_experts, num_threads, force: as for `ktops finetune`.
    """

    model: str
    adapter: str | None = None
    experts_path: str | None = None
    weight_format: str | None = None
    group_size: int | None = None
    quantize_method: str | None = None
    mmap: bool = False
    linear_format: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    num_gpu_experts: int = 0
    num_threads: int | None = None
    force: bool = False

    experts_implementation = "ktops"

    @classmethod
    def of(cls: type[Options], given: Mapping[str, Any]) -> Options:
        """Returns the options with these names; other names are ignored."""
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


@dataclass(frozen=True)
class Loaded:
    """A model to answer with.

    Attributes:
        model: in evaluation mode; with an adapter, as :func:`ktops.freeze_adapters` returns it.
        tokenizer: its tokenizer.
        trained_by_ktops: whether `ktops finetune` wrote the adapter.
        seconds: how long it took to load both.
    """

    model: Any
    tokenizer: Any
    trained_by_ktops: bool
    seconds: float


def load(options: LoadOptions, say: Say) -> Loaded:
    """Loads a model to answer with.

    All that can be checked without loading is checked first.

    Args:
        options: what to load.
        say: is called with what a user should know.

    Raises:
        UserError: the model or the adapter is missing, unsupported or damaged, they do not fit each other, or
            an option has a value that they do not support.
    """
    begin = time.perf_counter()
    options, adapter = prepare(options, say)
    tokenizer = load_tokenizer(options.model)
    model, quantized = load_base(options.model, DTYPES[options.dtype or "bf16"], options, show_progress=True)
    model = finish(model, options, adapter, say)
    placed = place(model, options)
    for report in filter(None, (quantized, placed)):
        say(str(report))
    by_ktops = adapter is not None and adapter.options is not None
    return Loaded(model, tokenizer, by_ktops, time.perf_counter() - begin)


def prepare(
    options: LoadOptions, say: Say, dtype_of: Callable[[str], str] | None = None
) -> tuple[LoadOptions, trained.Trained | None]:
    """Does what comes before loading: :func:`resolve`, :func:`check`, the plan of the memory, the threads.

    Args:
        options: what to load.
        say: is called with what a user should know.
        dtype_of: returns the dtype for the plan of a model's directory. Default: that of the options.
    """
    options, adapter = resolve(options, say)
    check(options, adapter)
    dtype = options.dtype or "bf16" if dtype_of is None else dtype_of(options.model)
    check_chat(options.model, dtype, options, options.force, say)
    if options.num_threads is not None:
        cores = set_num_threads(options.num_threads)
        if cores < options.num_threads:
            say(f"--num-threads {options.num_threads}: this machine has {cores} cores, so {cores} threads")
    return options, adapter


def finish(model, options: LoadOptions, adapter: trained.Trained | None, say: Say):
    """Does what comes after loading the base model.

    Returns:
        The model in evaluation mode, with its adapter frozen.

    Raises:
        UserError: PEFT cannot load the adapter, or ktops would run none of the experts.
    """
    require_ktops(model, options.model, say)
    if adapter is not None:
        model = freeze_adapters(with_adapter(model, adapter))
    if options.linear_format is not None:
        say(str(quantize_linear(model, options.linear_format)))
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_as_rows)
    return model.eval()


def _as_rows(head, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Gives the hidden state of a prompt's last token, a slice of all, the strides of one that stands alone.

    PyTorch folds slices into rows only for weights that require gradients. PEFT has frozen them, and the
    batched product that it runs instead takes 100 times as long in bfloat16.
    """
    (hidden_states,) = arguments
    return (hidden_states.reshape(-1, hidden_states.shape[-1]).view(hidden_states.shape),)


def resolve(options: LoadOptions, say: Say) -> tuple[LoadOptions, trained.Trained | None]:
    """Finds the model and the adapter, and how to load the experts.

    Returns:
        The options with absolute paths, and without those that are left open; and the adapter.

    Raises:
        UserError: there is no such adapter, MODEL is another, or it does not name a model on this machine.
    """
    adapter: trained.Trained | None = None
    if options.adapter is None and trained.is_adapter(options.model):
        adapter = trained.read_trained(options.model, "MODEL")
        base = find_model(adapter.base) if adapter.base else ""
        if not Path(base, "config.json").is_file():
            raise UserError(
                f"MODEL: {adapter.path} is an adapter, and its model, {adapter.base!r}, is not on this "
                f"machine. Pass MODEL --adapter {adapter.path}"
            )
        options = replace(options, model=base)
    else:
        if trained.is_adapter(options.model):
            raise UserError(
                f"MODEL: {options.model} is an adapter, and --adapter names another: {options.adapter}. Pass "
                "the model as MODEL, or leave --adapter out"
            )
        options = replace(options, model=find_model(options.model))
        if options.adapter is not None:
            adapter = trained.read_trained(options.adapter)
    if options.experts_path is not None:
        options = replace(options, experts_path=str(Path(options.experts_path).resolve()))
    if adapter is not None:
        options = _as_trained(options, adapter, say)
    return options, adapter


def _as_trained(options: LoadOptions, adapter: trained.Trained, say: Say) -> LoadOptions:
    """Loads the experts that an adapter was trained on, or says that they differ."""
    if not trained.is_trained_on(adapter, options.model):
        say(f"the adapter was trained on {adapter.base}, not on {options.model}")
    if adapter.options is None:
        return options
    changes: dict[str, Any] = {"dtype": options.dtype or adapter.options.get("dtype")}
    is_base = Path(adapter.options["model"] or adapter.base).resolve() == Path(options.model)
    for names in (trained.EXPERTS, trained.LINEAR):
        given = {name: value for name in names if (value := getattr(options, name)) is not None}
        recorded = adapter.recorded(names)
        if given and given != recorded:
            say(f"the adapter was trained with {_flags(recorded)}, not with {_flags(given)}")
        elif recorded and not given and is_base:
            say(f"{_flags(recorded)}, as the adapter was trained")
            changes |= recorded
        elif recorded and not given:
            say(f"the adapter was trained with {_flags(recorded)}; {options.model} keeps its own weights")
    return replace(options, **changes)


def _flags(values: dict[str, Any]) -> str:
    return " ".join(f"{flag(name)} {value}" for name, value in values.items()) or "the model's own weights"


def check(options: LoadOptions, adapter: trained.Trained | None) -> None:
    """Checks what can be checked before anything is loaded.

    Raises:
        UserError: see :func:`load`.
    """
    check_directory(options.model)
    require_device(options.device)
    if options.num_gpu_experts and options.device == "cpu":
        raise UserError("--num-gpu-experts needs --device")
    if options.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype must be bf16 or f32, got {options.dtype!r}")
    for name in ("num_threads", "group_size", "num_gpu_experts"):
        value = getattr(options, name)
        least = 1 if name == "num_threads" else 0
        if value is not None and value < least:
            raise UserError(f"{flag(name)} must be at least {least}, got {value}")
    if options.experts_path is not None and not Path(options.experts_path).exists():
        raise UserError(f"--experts-path: no such file or directory: {options.experts_path}")
    if options.mmap and options.weight_format is not None:
        raise UserError("--mmap uses the experts as the files hold them; leave out --weight-format")
    if options.weight_format is not None:
        require_settings(
            "--weight-format", options.weight_format, options.group_size, options.quantize_method
        )
        reads_experts(options.model, options)
    elif options.group_size is not None or options.quantize_method is not None:
        raise UserError("--group-size and --quantize-method need --weight-format")
    require_linear_format(options.linear_format)
    if adapter is not None:
        trained.require_fit(adapter, options.model)


def with_adapter(model, adapter: trained.Trained):
    """Returns the model with an adapter, in a PeftModel.

    Raises:
        UserError: PEFT cannot load it.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter.path))
    except (ValueError, KeyError, OSError, RuntimeError, ImportError, TypeError) as error:
        raise UserError(f"--adapter: {adapter.path} cannot be loaded: {error}") from None


def require_ktops(model, directory: str, say: Say) -> None:
    """Raises UserError if ktops runs none of the experts; says which it does not run."""
    found, outside = experts_outside_op(model)
    reasons = "; ".join(sorted(set(outside.values())))
    if len(outside) == found:
        raise UserError(
            f"MODEL: ktops runs no experts of {directory}: "
            f"{reasons or 'it has no Mixture-of-Experts layers'}. docs/models.md lists the models that it "
            "supports"
        )
    if outside:
        say(f"ktops runs the experts of {found - len(outside)} of {found} layers; {reasons}")


def describe(model) -> str:
    """Returns what was loaded, in a line: class, parameters, formats of the experts."""
    formats = {module.format: module for module in model.modules() if isinstance(module, ExpertWeight)}
    nbytes = sum(module.nbytes for module in model.modules() if isinstance(module, ExpertWeight))
    base = getattr(model, "get_base_model", lambda: model)()
    stored = f", experts in {', '.join(formats)} ({format_bytes(nbytes)})" if formats else ""
    return f"{type(base).__name__}, {count_weights(model) / 1e6:,.1f} M parameters{stored}"
