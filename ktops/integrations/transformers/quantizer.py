"""KTConfig: ``from_pretrained(..., quantization_config=KTConfig(...))`` loads experts in a weight format.

The experts modules are replaced by stand-ins without weights before transformers loads the model, so that no
dense experts are ever made, and by :class:`ktops.nn.KTExperts` after it.
"""

import copy
from pathlib import Path

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ktops.checkpoints import open_checkpoint
from ktops.checkpoints.load import PendingExperts, experts_modules, load_layers
from ktops.checkpoints.match import match_layers
from ktops.formats import METHODS, get_format
from ktops.integrations.swap import exchange

NAME = "ktops"
"""``quant_method`` in config.json."""


KEYS_OF_EXPERTS = r"(^|\.)experts\.(\d+\.|gate_up_proj|gate_proj|up_proj|down_proj)"
"""Keys that transformers finds in the files and is not to load, or to report."""


class KTConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` loads the experts of a model; the other weights load as they do without.

    Args:
        weight_format: one of ``ktops.formats.names()``; None keeps the format of the checkpoint.
        group_size, method: as of :func:`ktops.quantize`, where weights are quantised.
        experts_path: another checkpoint to take the experts from, a directory or a GGUF file; default: the
            one that is loaded.
        prefix: as of :func:`ktops.load_experts`, where several experts of the checkpoint could be meant.

    Raises:
        ValueError: unknown format or method, or the format does not have the group size.

    Example:
        >>> ktops.enable()
        >>> config = ktops.KTConfig(weight_format="int4", group_size=128)
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", quantization_config=config)
    """

    def __init__(
        self,
        weight_format: str | None = None,
        group_size: int | None = None,
        method: str = "rtn",
        experts_path: str | None = None,
        prefix: str | None = None,
        **_,
    ) -> None:
        self.quant_method = NAME
        self.weight_format, self.group_size, self.method = weight_format, group_size, method
        self.experts_path, self.prefix = experts_path, prefix
        if weight_format is not None:
            known = get_format(weight_format)
            known.check_group_size(known.default_group_size if group_size is None else group_size)
        known_methods = METHODS if weight_format is None else known.methods
        if method not in known_methods:
            raise ValueError(f"KTConfig: method must be one of {', '.join(known_methods)}, got {method!r}")

    def to_dict(self) -> dict:
        """What config.json says: a model that is saved has its experts with it."""
        return {
            key: value for key, value in super().to_dict().items() if key not in ("experts_path", "prefix")
        }


class KTQuantizer(HfQuantizer):
    """What transformers calls around the loading of weights."""

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        self._model = model
        config = self.quantization_config
        if config.experts_path is not None:
            self._path = Path(config.experts_path)
        elif checkpoint_files:
            self._path = Path(checkpoint_files[0]).parent
        else:
            raise ValueError("KTConfig: the weights must come from files, or give experts_path")
        for module in experts_modules(model).values():
            exchange(model, module, PendingExperts(module))
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, KEYS_OF_EXPERTS}

    def update_weight_conversions(self, weight_conversions, *model):
        """Without those that would merge the weights of experts, by which ktops reads their names.

        transformers gives the model since 5.21.
        """
        self._conversions = copy.deepcopy(weight_conversions)
        conversions = super().update_weight_conversions(weight_conversions, *model)
        of_experts = [conversion for conversion in conversions if _is_of_experts(conversion)]
        patterns = {p.replace("*.", r".*\.") for each in of_experts for p in each.source_patterns}
        ignored = self._model._keys_to_ignore_on_load_unexpected or ()
        self._model._keys_to_ignore_on_load_unexpected = {*ignored, *patterns}
        return [conversion for conversion in conversions if conversion not in of_experts]

    def _process_model_after_weight_loading(self, model, **kwargs):
        config, modules = self.quantization_config, experts_modules(model)
        layers = match_layers(
            open_checkpoint(self._path), model, modules, prefix=config.prefix, conversions=self._conversions
        )
        options = {name: getattr(config, name) for name in ("weight_format", "group_size", "method")}
        load_layers(model, modules, layers, options)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _is_of_experts(conversion) -> bool:
    targets = getattr(conversion, "target_patterns", ())
    return any("experts.gate_up_proj" in target or "experts.down_proj" in target for target in targets)


def enable() -> None:
    """Makes ``quant_method="ktops"`` known to transformers; a second call does nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = KTConfig
    AUTO_QUANTIZER_MAPPING[NAME] = KTQuantizer


def disable() -> None:
    """Takes it out again."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(NAME, None)
    AUTO_QUANTIZER_MAPPING.pop(NAME, None)
