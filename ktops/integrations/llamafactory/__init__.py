"""LLaMA-Factory with ``use_kt: true``: its own trainers and files, with the experts run by ktops."""

import os
import sys

__all__ = ["allow_versions", "enable"]


def enable() -> None:
    """Makes LLaMA-Factory, which must be installed, take ``use_kt`` and the ``kt_*`` keys.

    ``ktops launch`` calls it. Call it in a test or a notebook that uses LLaMA-Factory's functions.

    Raises:
        RuntimeError: an unknown version of LLaMA-Factory.

    Example:
        >>> ktops.integrations.llamafactory.enable()
        >>> from llamafactory.train.tuner import run_exp
        >>> run_exp({"use_kt": True, "kt_backend": "AMXInt8", "stage": "sft", ...})
    """
    import ktops.integrations
    from ktops.integrations.llamafactory import arguments, model

    allow_versions()
    ktops.integrations.enable()
    arguments.enable()
    model.enable()


def allow_versions() -> None:
    """Lets LLaMA-Factory start with versions of transformers and PEFT that it does not list.

    It checks them when it is imported. ktops' own tests cover newer versions.
    """
    from llamafactory.extras import misc

    from ktops.integrations.llamafactory.places import is_fork

    if is_fork():
        return
    try:
        misc.check_dependencies()
    except ImportError as error:
        if not str(error).startswith(("transformers", "peft")):
            raise
        print(f"ktops: DISABLE_VERSION_CHECK=1 for LLaMA-Factory: {error}", file=sys.stderr)
        os.environ["DISABLE_VERSION_CHECK"] = "1"
    if os.environ.get("FORCE_TORCHRUN", "0").lower() not in ("1", "true", "y"):
        os.environ["USE_KT"] = "1"
