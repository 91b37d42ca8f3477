"""Refuses to train a model none of whose experts run through ktops."""

from torch import nn

from ktops.integrations.replacements import Replacements
from ktops.integrations.transformers.coverage import experts_outside_op

_replaced = Replacements()


def enable() -> None:
    """Checks a model at the start of training, before its first step; a second call does nothing.

    Trainers of transformers, TRL and others that build on them call ``CallbackHandler.on_train_begin``.
    """
    from transformers.trainer_callback import CallbackHandler

    if not _replaced:
        _replaced.install(CallbackHandler, on_train_begin=_on_train_begin)


def disable() -> None:
    """Undoes :func:`enable`."""
    _replaced.restore()


def _on_train_begin(handler, *args, **kwargs):
    """``CallbackHandler.on_train_begin``."""
    require_op(handler.model)
    return _replaced.original["on_train_begin"](handler, *args, **kwargs)


def require_op(model: nn.Module) -> None:
    """Raises unless the op runs at least one experts module of a model.

    Raises:
        RuntimeError: the message says why, for each kind of experts.
    """
    found, outside = experts_outside_op(model)
    if found and len(outside) < found:
        return
    reasons = sorted(set(outside.values())) or ["the model has no Mixture-of-Experts layers"]
    raise RuntimeError(
        f"ktops: nothing of {type(model).__name__} would run through ktops: {'; '.join(reasons)}. "
        "docs/models.md lists the models that ktops supports. To train without ktops, leave `ktops launch`, "
        "the variable KTOPS_LAUNCH and the trainer's plugin out"
    )
