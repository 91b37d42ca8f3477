"""`ktops serve`, and `transformers serve` under `ktops launch`: the server of transformers on ktops."""

import sys
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from ktops.checkpoints.config import quantization_of
from ktops.cli import inference
from ktops.cli.errors import UserError
from ktops.cli.finetune.options import require_settings
from ktops.cli.inference import LoadOptions
from ktops.cli.models import experts_settings
from ktops.cli.trained import Trained, is_adapter
from ktops.formats import names
from ktops.integrations.replacements import Replacements
from ktops.integrations.settings import Settings

if TYPE_CHECKING:
    from ktops.integrations.transformers.config import KTConfig

OTHER_METHODS = ("bnb-4bit", "bnb-8bit")
"""Values of ``transformers serve --quantization`` that are not ktops'."""

_replaced = Replacements()

_experts: ContextVar["KTConfig | None"] = ContextVar("experts", default=None)
"""How to load the experts of the model that is being loaded."""

_asked: dict[str, tuple[LoadOptions, Trained | None]] = {}
"""What `ktops serve` loads for a model's name."""


def serve(options: LoadOptions, arguments: list[str]) -> None:
    """Runs `ktops serve` until it is stopped.

    Args:
        options: what to load; transformers decides about dtype and device.
        arguments: options of ``transformers serve``.

    Raises:
        UserError: something is wrong with the model, the adapter or an option, or transformers has no server.
    """
    try:
        from transformers.cli.serving import model_manager  # noqa: F401
        from transformers.cli.transformers import app
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise UserError(f"serve needs transformers>=5.5: {error}") from None
    if not is_serve_available():
        raise UserError("serve needs the server of transformers: pip install 'transformers[serving]'")
    name = options.model
    resolved, adapter = inference.prepare(options, _say, partial(_dtype, arguments))
    _asked[name] = resolved, adapter
    enable()
    app(["serve", name, *arguments])


def _dtype(arguments: list[str], model: str) -> str:
    """Returns "bf16" or "f32", whichever is the size of what ``transformers serve`` loads a model in."""
    from transformers import AutoConfig

    given = [value for name, value in pairwise(arguments) if name == "--dtype"]
    given += [argument.partition("=")[2] for argument in arguments if argument.startswith("--dtype=")]
    if not given or given[-1] == "auto":
        given = [str(AutoConfig.from_pretrained(model, local_files_only=True).dtype)]
    return "f32" if given[-1].endswith("float32") else "bf16"


def enable() -> None:
    """Changes how ``transformers serve`` loads models; a second call does nothing.

    Experts run through ktops, or loading is an error. The name of a model may be the directory of an adapter,
    which is loaded with the model and the weight format that it was trained on. ``--quantization`` takes the
    weight formats of ktops, too.
    """
    from transformers.cli.serving.model_manager import ModelManager

    from ktops.integrations.transformers import default

    default.enable()
    if not _replaced:
        _replaced.install(
            ModelManager,
            _validate_args=_validate_args,
            get_quantization_config=_get_quantization_config,
            _load_processor=_load_processor,
            _load_model=_load_model,
        )


def disable() -> None:
    """Undoes :func:`enable` and :func:`serve`."""
    _replaced.restore()
    _asked.clear()


def _validate_args(manager) -> None:
    """``ModelManager._validate_args``, which knows the methods of bitsandbytes only."""
    asked = manager.quantization
    if asked not in (None, *names(), *OTHER_METHODS):
        raise ValueError(
            f"--quantization: expected one of {', '.join((*OTHER_METHODS, *names()))}, got {asked!r}"
        )
    if asked in names():
        require_settings("--quantization", asked, None, None)
        manager.quantization = None
    try:
        _replaced.original["_validate_args"](manager)
    finally:
        manager.quantization = asked


def _get_quantization_config(manager):
    """``ModelManager.get_quantization_config``."""
    return _experts.get() or _replaced.original["get_quantization_config"](manager)


def _load_processor(manager, name: str, *args, **kwargs):
    """``ModelManager._load_processor``."""
    return _replaced.original["_load_processor"](manager, _of(manager, name)[0], *args, **kwargs)


def _load_model(manager, name: str, *args, **kwargs):
    """``ModelManager._load_model``."""
    base, options, adapter = _of(manager, name, _say)
    token = _experts.set(_experts_config(manager, base, options))
    try:
        model = _replaced.original["_load_model"](manager, base, *args, **kwargs)
    finally:
        _experts.reset(token)
    return inference.finish(model, replace(options, model=base), adapter, _say)


def _experts_config(manager, base: str, options: LoadOptions) -> "KTConfig | None":
    """Returns the quantization_config with which from_pretrained loads the experts."""
    from transformers import AutoConfig
    from transformers.cli.serving.utils import split_revision

    if manager.quantization is not None and options.weight_format is None:
        return None  # of bitsandbytes
    directory, revision = split_revision(base)
    config = AutoConfig.from_pretrained(
        directory, revision=revision, trust_remote_code=manager.trust_remote_code
    )
    settings = experts_settings(options) or Settings()
    return settings.quantization_config(quantization_of(config.to_dict()))


def _of(manager, name: str, say=lambda line: None):
    """Returns the name of the model to load, how to load it, and the adapter for it.

    Raises:
        UserError: an adapter's model is not on this machine, or is another one.
    """
    if name in _asked:
        options, adapter = _asked[name]
        return options.model, options, adapter
    asked = manager.quantization if manager.quantization in names() else None
    options = LoadOptions(name, weight_format=asked)
    if not is_adapter(name):
        return name, options, None
    options, adapter = inference.prepare(options, say)
    return options.model, options, adapter


def _say(line: str) -> None:
    print(f"ktops: {line}", file=sys.stderr)
