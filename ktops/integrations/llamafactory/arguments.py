"""Takes ``use_kt`` and the ``kt_*`` keys out of the arguments before LLaMA-Factory parses them."""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from ktops.integrations import training
from ktops.integrations.llamafactory.places import is_fork, require
from ktops.integrations.replacements import Replacements
from ktops.integrations.settings import Settings, is_key, set_num_threads, take_settings
from ktops.integrations.transformers import default

DTYPES = ("bfloat16", "float16", "float32")

TRAINING = {"do_train", "do_eval", "do_predict", "output_dir"}
"""Options that only training has. ktops computes on the CPU, so it adds ``use_cpu``."""

_replaced = Replacements()


@dataclass(frozen=True)
class Choice:
    """What the arguments say about ktops.

    Attributes:
        settings: those of ``use_kt: true``; None if it is absent or false.
        torch_dtype: the dtype to load the model in; None for the checkpoint's.
    """

    settings: Settings | None = None
    torch_dtype: torch.dtype | None = None


class _Options(dict):
    """Options without ktops' keys. Keeps what these said, also when it is sent to another process."""

    choice: Choice


class _Words(list):
    """The words of a command line without ktops' options; as :class:`_Options`."""

    choice: Choice


_current = Choice()


def current() -> Choice:
    """Returns what the arguments that LLaMA-Factory has read last say."""
    return _current


def enable() -> None:
    """Replaces ``read_args`` wherever LLaMA-Factory holds it, but in KTransformers' fork.

    A second call does nothing.
    """
    from llamafactory.hparams import parser

    if _replaced or is_fork():
        return
    require(parser, "read_args")
    original = parser.read_args
    for name in ("llamafactory.hparams.parser", "llamafactory.hparams", "llamafactory.train.tuner"):
        module = sys.modules.get(name)
        if module is not None and getattr(module, "read_args", None) is original:
            _replaced.install(module, read_args=_read_args)


def disable() -> None:
    """Restores LLaMA-Factory's own function."""
    global _current
    _replaced.restore()
    _current = Choice()


def _read_args(args: dict[str, Any] | list[str] | None = None) -> dict[str, Any] | list[str]:
    """``read_args``, without ktops' keys in what it returns."""
    global _current
    read = _replaced.original["read_args"](args)
    if not isinstance(read, (_Options, _Words)):
        read = _from_words(read) if isinstance(read, list) else _from_options(read)
    _current = read.choice
    return read


def _from_options(given: dict[str, Any]) -> _Options:
    options = _Options(given)
    options.choice = _take(options)
    if options.choice.settings is not None and TRAINING & options.keys():
        options.setdefault("use_cpu", True)
    return options


def _from_words(words: list[str]) -> _Words:
    """Takes options such as ``--use_kt true`` and ``--kt_backend=AMXInt8`` out of a command line."""
    rest, taken = _Words(), {}
    left = list(reversed(words))
    while left:
        word = left.pop()
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not (key == "torch_dtype" or is_key(key)):
            rest.append(word)
            continue
        is_flag = not equals and (not left or left[-1].startswith("--"))
        taken[key] = value if equals else "true" if is_flag else left.pop()
    rest.choice = _take(taken)
    for key, value in taken.items():  # torch_dtype without use_kt
        rest += [f"--{key}", value]
    given = {word.removeprefix("--").partition("=")[0] for word in words}
    if rest.choice.settings is not None and TRAINING & given and "use_cpu" not in given:
        rest += ["--use_cpu", "true"]
    return rest


def _take(config: dict[str, Any]) -> Choice:
    """Removes ktops' keys from a configuration and applies what concerns the whole process."""
    refused = config.get("use_kt") is not None
    settings = take_settings(config)
    if settings is None:
        if refused:
            default.disable()
            training.disable()
        return Choice()
    if config.get("use_unsloth"):
        raise ValueError("use_unsloth must be absent or false with use_kt: true; both replace the experts")
    if config.get("use_llama_pro"):
        raise ValueError("use_llama_pro must be absent or false with use_kt: true")
    dtype = _dtype(config.pop("torch_dtype", None))
    training.enable()
    _set_threads(settings.num_threads)
    if settings.without_effect:
        print(f"ktops: without effect: {', '.join(settings.without_effect)}", file=sys.stderr)
    return Choice(settings, dtype)


def _dtype(name: object) -> torch.dtype | None:
    if name in (None, "auto"):
        return None
    if name not in DTYPES:
        raise ValueError(f"torch_dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    return getattr(torch, str(name))


def _set_threads(wanted: int | None) -> None:
    if wanted is not None and (cores := set_num_threads(wanted)) < wanted:
        print(f"ktops: kt_num_threads {wanted} is more than the number of cores, {cores}", file=sys.stderr)
