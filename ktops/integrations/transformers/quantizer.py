"""KTConfig: ``from_pretrained(..., quantization_config=KTConfig(...))`` loads experts in a weight format.

The experts modules are replaced by stand-ins without weights before transformers loads the model, so that no
dense experts are ever made, and by :class:`ktops.nn.KTExperts` after it.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ktops.checkpoints.checkpoint import open_checkpoint
from ktops.checkpoints.config import LOADER, needs_quantizer
from ktops.checkpoints.load import PendingExperts, experts_modules, load_layers
from ktops.checkpoints.match import match_layers
from ktops.formats import METHODS, get_format
from ktops.integrations.swap import exchange
from ktops.integrations.transformers.loaded import require_loaded
from ktops.integrations.transformers.other_quantizer import PlainQuantizer, other_quantizer

NAME = "ktops"
"""``quant_method`` of a KTConfig."""

WATCHED = "_adjust_missing_and_unexpected_keys"
"""The method that transformers calls with the keys that only the model has, or only the files."""

KEYS_OF_EXPERTS = re.compile(r"(^|\.)experts\.(\d+\.|gate_up_proj|gate_proj|up_proj|down_proj)")
"""Keys in the files that transformers must neither load nor report."""


class KTConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` loads the experts of a model; the other weights load as they do without it.

    If another library has quantized the other tensors too, its quantizer reads those and ktops reads the
    experts. If that quantizer can decode (FP8, compressed-tensors), the other weights become dense, in the
    model's dtype, because hidden states are on the CPU.

    Args:
        weight_format: one of ``ktops.formats.names()``; None keeps the format of the checkpoint.
        group_size, method: as of :func:`ktops.quantize`, where weights are quantized.
        experts_path: another checkpoint to take the experts from, a directory or a GGUF file; default: the
            one that is loaded.
        prefix: as of :func:`ktops.load_experts`, if several experts of the checkpoint match.
        other: the quantization_config of all tensors but the experts'; default: the one in config.json.

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
        other: dict | QuantizationConfigMixin | None = None,
        **_,
    ) -> None:
        self.quant_method = NAME
        self.weight_format, self.group_size, self.method = weight_format, group_size, method
        self.experts_path, self.prefix, self.other = experts_path, prefix, other
        if weight_format is not None:
            known = get_format(weight_format)
            known.check_group_size(known.default_group_size if group_size is None else group_size)
        known_methods = METHODS if weight_format is None else known.methods
        if method not in known_methods:
            raise ValueError(f"KTConfig: method must be one of {', '.join(known_methods)}, got {method!r}")

    def to_dict(self) -> dict:
        """What goes into config.json; not experts_path and prefix, as a saved model contains its experts."""
        made: dict = {"loader": LOADER}
        if self.weight_format is not None:
            made |= {
                "weight_format": self.weight_format,
                "group_size": self.group_size,
                "method": self.method,
            }
        if self.other is not None:
            made["other"] = self.other if isinstance(self.other, dict) else self.other.to_dict()
        return made


class KTQuantizer(HfQuantizer):
    """The hooks that transformers calls when it loads and saves weights.

    ktops handles the experts. For everything else, each hook is forwarded to :attr:`other`.

    Attributes:
        other: the quantizer of all tensors but the experts'; a :class:`PlainQuantizer` if they are plain.
    """

    def __init__(self, quantization_config: KTConfig, **_) -> None:
        super().__init__(quantization_config, pre_quantized=True)
        self.other: HfQuantizer = PlainQuantizer(quantization_config)
        self._refusal: Exception | None = None
        self._loading_info = None
        self._experts_patterns: list[re.Pattern] = []
        if quantization_config.other is not None:
            with self._refusing():
                self.other = other_quantizer(quantization_config.other)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Keeps what the other quantizer is missing; it becomes an error only if there are tensors for it."""
        try:
            yield
        except (ImportError, RuntimeError, ValueError) as error:
            self._refusal = error

    def validate_environment(self, *args, **kwargs) -> None:
        with self._refusing():
            self.other.validate_environment(*args, **kwargs)

    def preprocess_model(self, model, dtype=None, checkpoint_files=None, **kwargs) -> None:
        path = self.quantization_config.experts_path
        if not checkpoint_files and path is None:
            raise ValueError("KTConfig: the weights must come from files; otherwise pass experts_path")
        if checkpoint_files:
            self._require_other(Path(checkpoint_files[0]).parent)
        self._path = Path(checkpoint_files[0]).parent if path is None else Path(path)
        for module in experts_modules(model).values():
            exchange(model, module, PendingExperts(module))
        self.other.preprocess_model(model, dtype=dtype, checkpoint_files=checkpoint_files, **kwargs)
        self._watch(model)

    def _require_other(self, directory: Path) -> None:
        """Raises if tensors need the other quantizer and it cannot run; drops it if no tensor needs it."""
        if self.quantization_config.other is None:
            return
        if not needs_quantizer(open_checkpoint(directory).other_tensors()):
            self.other = PlainQuantizer(self.quantization_config)
        elif self._refusal is not None:
            raise type(self._refusal)(
                f"ktops: the experts of {directory} can be loaded, but other tensors in it are quantized "
                f"too, and the library that reads them cannot run here: {self._refusal}"
            ) from self._refusal

    def _watch(self, model) -> None:
        """Records which weights transformers does not find in the files, which it would only log.

        The experts' keys are removed from the unexpected ones, because ktops loads them.
        """
        adjust = model._adjust_missing_and_unexpected_keys

        def watched(loading_info) -> None:
            patterns = [KEYS_OF_EXPERTS, *self._experts_patterns]
            loading_info.unexpected_keys = {
                name
                for name in loading_info.unexpected_keys
                if not any(pattern.search(name) for pattern in patterns)
            }
            adjust(loading_info)
            self._loading_info = loading_info

        model.__dict__[WATCHED] = watched

    def update_weight_conversions(self, weight_conversions, model):
        """Drops the conversions that would merge experts' weights; ktops keeps them all to map names."""
        self._conversions = copy.deepcopy(weight_conversions)
        self._experts_patterns = [
            re.compile(source.replace("*.", r".*\."))
            for conversion in weight_conversions
            if _is_of_experts(conversion)
            for source in conversion.source_patterns
        ]
        return self.other.update_weight_conversions(without_experts(weight_conversions), model)

    def postprocess_model(self, model, **kwargs):
        del model.__dict__[WATCHED]
        if self._loading_info is not None:
            require_loaded(model, self._loading_info.missing_keys, self._loading_info.unexpected_keys)
        self._loading_info = None
        self.other.postprocess_model(model, **kwargs)
        asked = self.quantization_config
        if getattr(self.other.quantization_config, "dequantize", False):
            self.other = PlainQuantizer(asked)
        self.quantization_config = KTConfig(other=None if self.is_plain else self.other.quantization_config)
        model.is_quantized = not self.is_plain
        model.hf_quantizer = self
        modules = experts_modules(model)
        layers = match_layers(
            open_checkpoint(self._path), model, modules, prefix=asked.prefix, conversions=self._conversions
        )
        options = {name: getattr(asked, name) for name in ("weight_format", "group_size", "method")}
        load_layers(model, modules, layers, options)
        return model

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the experts is quantized."""
        return isinstance(self.other, PlainQuantizer)

    def is_serializable(self) -> bool:
        return self.other.is_serializable()

    @property
    def is_trainable(self) -> bool:
        return self.other.is_trainable

    @property
    def is_qat_trainable(self) -> bool:
        return self.other.is_qat_trainable

    @property
    def is_compileable(self) -> bool:
        return self.other.is_compileable

    @property
    def quantized_element_size(self) -> float | None:
        return getattr(self.other, "quantized_element_size", None)


def _forwarded(name: str):
    def hook(self, *args, **kwargs):
        return getattr(self.other, name)(*args, **kwargs)

    hook.__name__ = name
    return hook


for _name, _member in vars(HfQuantizer).items():
    if isinstance(_member, FunctionType) and not _name.startswith("_") and _name not in vars(KTQuantizer):
        setattr(KTQuantizer, _name, _forwarded(_name))


def without_experts(conversions: Iterable) -> list:
    """The conversions of transformers that do not make stacked weights of experts."""
    return [conversion for conversion in conversions if not _is_of_experts(conversion)]


def _is_of_experts(conversion) -> bool:
    targets = getattr(conversion, "target_patterns", ())
    return any("experts.gate_up_proj" in target or "experts.down_proj" in target for target in targets)
