"""Lets transformers save a model whose experts are in formats, so that from_pretrained loads it."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from ktops.formats import ExpertWeight
from ktops.integrations.transformers.quantizer import KTConfig, KTQuantizer, without_experts


def attach(model: nn.Module) -> None:
    """Sets the config, the quantizer and the conversions that ``save_pretrained`` uses.

    Args:
        model: any module; every PreTrainedModel in it that has experts in formats is changed.
    """
    known: dict[PreTrainedModel, KTQuantizer] = {}
    for part in _with_formats(model):
        quantizer = known.get(part) or _quantizer(part)
        known |= dict.fromkeys(_with_formats(part), quantizer)
        part.hf_quantizer = quantizer
        part.config.quantization_config = quantizer.quantization_config
        part._weight_conversions = _conversions(part)


def _with_formats(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers models in a module whose experts are in formats, outermost first."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and any(isinstance(m, ExpertWeight) for m in part.modules()):
            yield part


def _quantizer(model: PreTrainedModel) -> KTQuantizer:
    """The model's KTQuantizer, or a new one around the quantizer that loaded its other tensors."""
    found = getattr(model, "hf_quantizer", None)
    if isinstance(found, KTQuantizer):
        return found
    made = KTQuantizer(KTConfig())
    if found is not None:
        made.quantization_config.other = found.quantization_config
        made.other = found
    return made


def _conversions(model: PreTrainedModel) -> list[WeightConverter]:
    """The conversions that transformers reverts when it saves the model: all but those of experts.

    Renamings are left out: names stay those of the state dict, which a Trainer expects when it resumes.
    """
    used = getattr(model, "_weight_conversions", None)
    if used is None:
        used = get_model_conversion_mapping(model, add_legacy=False)
    converters = (conversion for conversion in used if isinstance(conversion, WeightConverter))
    return [converter for converter in without_experts(converters) if _is_reversible(converter)]


def _is_reversible(converter: WeightConverter) -> bool:
    """Not if a quantizer's modules write their own tensors, as bitsandbytes' do."""
    try:
        converter.reverse_transform()
    except NotImplementedError:
        return False
    return True
