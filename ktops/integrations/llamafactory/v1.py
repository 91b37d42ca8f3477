"""LLaMA-Factory's second trainer, of ``USE_V1=1``, which has a training loop of its own."""

from ktops.integrations.replacements import Replacements
from ktops.integrations.training import require_op

_replaced = Replacements()


def enable() -> None:
    """Checks a model at the start of training, before its first step; a second call does nothing."""
    from llamafactory.v1.core.base_trainer import BaseTrainer

    if not _replaced:
        _replaced.install(BaseTrainer, fit=_fit)


def disable() -> None:
    """Undoes :func:`enable`."""
    _replaced.restore()


def _fit(trainer) -> None:
    """``BaseTrainer.fit``."""
    require_op(trainer.model)
    _replaced.original["fit"](trainer)
