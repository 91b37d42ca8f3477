"""Loads the extension module, which registers the operators of the kt namespace with PyTorch."""

try:
    import torch  # noqa: F401  (libtorch must be in the process first)
except ImportError as error:
    raise ImportError("ktops needs PyTorch 2.10 or later: pip install torch") from error

try:
    from ktops import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"ktops: the compiled operators could not be loaded ({error}). Build and install them with\n"
        "  pip install --no-build-isolation ktops\n"
        "or, in a source tree, pip install --no-build-isolation -e ."
    ) from error
