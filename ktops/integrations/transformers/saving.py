"""Lets transformers save a model whose experts are in formats, so that from_pretrained loads it."""

import importlib.util
import sys

from torch import nn


def enable_saving(model: nn.Module) -> None:
    """Sets the config, the quantizer and the conversions that ``save_pretrained`` uses.

    Does nothing if transformers is not imported or is too old for :func:`ktops.enable`.
    """
    if "transformers" in sys.modules and importlib.util.find_spec("transformers.core_model_loading"):
        from ktops.integrations.transformers.quantizer import attach

        attach(model)
