"""Lets transformers save a model whose experts are in formats, so that from_pretrained loads it.

Linear layers in int8 cannot be loaded from files, so a model that has them is refused.
"""

import importlib.util
import sys
from types import MethodType

from torch import nn

from ktops.nn.int8_linear import Int8Linear


def enable_saving(model: nn.Module) -> None:
    """Sets the config, the quantizer and the conversions that ``save_pretrained`` uses.

    Does nothing if transformers is not imported or is too old for :func:`ktops.enable`.
    """
    if "transformers" in sys.modules and importlib.util.find_spec("transformers.core_model_loading"):
        from ktops.integrations.transformers.quantizer import attach

        attach(model)


def refuse_saving(model: nn.Module) -> None:
    """Makes ``save_pretrained`` of a model with linear layers in int8 an error, except for adapters.

    Args:
        model: any module; changes every PreTrainedModel in it that has such layers.
    """
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel) and any(isinstance(m, Int8Linear) for m in part.modules()):
            part.__dict__["save_pretrained"] = MethodType(_save_pretrained, part)


def _save_pretrained(model, *args, **kwargs):
    """``PreTrainedModel.save_pretrained`` of a model with linear layers in int8."""
    if getattr(model, "_hf_peft_config_loaded", False):  # writes only the adapters of model.add_adapter
        return type(model).save_pretrained(model, *args, **kwargs)
    raise ValueError(
        f"save_pretrained: {type(model).__name__} has linear layers in int8, which from_pretrained does not "
        "load. Save the model before ktops.quantize_linear and convert it again after loading, or save its "
        "adapters"
    )
