"""Makes "ktops" the experts implementation of models that ask for none."""

from ktops._warn import warn_once
from ktops.integrations import transformers


def enable() -> None:
    """Enables ktops in transformers, and makes it the default for experts; a second call does nothing.

    Warns, and leaves transformers as it is, if its version has no experts interface. Training is then an
    error, see :mod:`ktops.integrations.training`.
    """
    try:
        transformers.enable()
    except ImportError as error:
        warn_once(f"ktops launch: models of transformers do not run through ktops: {error}")
        return
    from ktops.integrations.transformers import pretrained

    pretrained.set_default(transformers.NAME)


def disable() -> None:
    """Undoes :func:`enable` for models created from now on: they run ktops only if they ask for it."""
    from ktops.integrations.transformers import pretrained

    pretrained.set_default(None)
