"""Makes "ktops" the experts implementation of models that ask for none."""

from ktops._warn import warn_once
from ktops.integrations import transformers
from ktops.integrations.replacements import Replacements

_replaced = Replacements()


def enable() -> None:
    """Enables ktops in transformers, and makes it the default for experts; a second call does nothing.

    Warns, and leaves transformers as it is, if its version has no experts interface. Training is then an
    error, see :mod:`ktops.integrations.training`.
    """
    if _replaced:
        return
    try:
        transformers.enable()
    except ImportError as error:
        warn_once(f"ktops launch: models of transformers do not run through ktops: {error}")
        return
    from transformers import PreTrainedModel

    _replaced.install(PreTrainedModel, get_correct_experts_implementation=_default_to_ktops)


def disable() -> None:
    """Undoes :func:`enable` for models created from now on: they run ktops only if they ask for it."""
    _replaced.restore()


def _default_to_ktops(model, requested_experts: str | None) -> str:
    """``PreTrainedModel.get_correct_experts_implementation``."""
    requested = transformers.NAME if requested_experts is None else requested_experts
    return _replaced.original["get_correct_experts_implementation"](model, requested)
