"""Refuses to train a model none of whose experts run through ktops."""

import sys

from torch import nn

from ktops.integrations.replacements import Replacements
from ktops.integrations.transformers.coverage import experts_outside_op
from ktops.ops import cpu_capability, memory_stats

_replaced = Replacements()


def enable() -> None:
    """Checks a model at the start of training, before its first step; a second call does nothing.

    Trainers of transformers, TRL and others that build on them call the events of ``CallbackHandler``. After
    each step, a second check makes sure that operators have run in this process.
    """
    from transformers.trainer_callback import CallbackHandler

    if not _replaced:
        _replaced.install(CallbackHandler, on_train_begin=_on_train_begin, on_step_end=_on_step_end)


def disable() -> None:
    """Undoes :func:`enable`."""
    _replaced.restore()


def _on_train_begin(handler, args, state, control, **kwargs):
    """``CallbackHandler.on_train_begin``, which also says what ktops runs."""
    total, outside = require_op(handler.model)
    if state.is_world_process_zero:
        runs = f"ktops runs the experts of {total - len(outside)} of {total} layers, with {cpu_capability()}"
        print("; ".join([runs, *sorted(set(outside.values()))]), file=sys.stderr)
    return _replaced.original["on_train_begin"](handler, args, state, control, **kwargs)


def _on_step_end(handler, *args, **kwargs):
    """``CallbackHandler.on_step_end``."""
    if not memory_stats()["allocations"]:
        raise RuntimeError(
            f"ktops: no operator of ktops has run in a training step of {_name(handler.model)}, "
            "although its experts were set to run through ktops"
        )
    return _replaced.original["on_step_end"](handler, *args, **kwargs)


def require_op(model: nn.Module) -> tuple[int, dict[str, str]]:
    """Raises unless the op runs at least one experts module of a model.

    Returns:
        What :func:`experts_outside_op` does.

    Raises:
        RuntimeError: the message says why, for each kind of experts.
    """
    found, outside = experts_outside_op(model)
    if found and len(outside) < found:
        return found, outside
    reasons = sorted(set(outside.values())) or ["the model has no Mixture-of-Experts layers"]
    raise RuntimeError(
        f"ktops: nothing of {_name(model)} would run through ktops: {'; '.join(reasons)}. "
        "docs/models.md lists the models that ktops supports. To train without ktops, leave `ktops launch`, "
        "the variable KTOPS_LAUNCH and the trainer's plugin out"
    )


def _name(model: nn.Module) -> str:
    """Returns the name of a model's class; of a PeftModel, that of its base."""
    get_base_model = getattr(model, "get_base_model", None)
    return type(model if get_base_model is None else get_base_model()).__name__
