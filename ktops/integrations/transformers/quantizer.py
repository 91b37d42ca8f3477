"""KTQuantizer: the hooks transformers calls to load and save a model whose experts are in weight formats.

Before transformers loads the model, placeholders without weights replace the experts modules, so that no
dense experts are ever created. Afterward, :class:`ktops.nn.KTExperts` replace the placeholders.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer

from ktops._warn import warn_once
from ktops.checkpoints.checkpoint import open_checkpoint
from ktops.checkpoints.config import needs_quantizer
from ktops.checkpoints.match import match_layers
from ktops.formats import ExpertWeight
from ktops.integrations import peft
from ktops.integrations.loading import LoadReport, PendingExperts, experts_modules, load_layers
from ktops.integrations.sharded_experts import ExpertParallel, require_whole_experts
from ktops.integrations.swap import exchange
from ktops.integrations.transformers.config import KTConfig
from ktops.integrations.transformers.loaded import adjusted, require_loaded
from ktops.integrations.transformers.other_quantizer import PlainQuantizer, decodes_fp8, other_quantizer

WATCHED = "_adjust_missing_and_unexpected_keys"
"""The method that transformers calls with the keys that only the model or only the files have."""

KEYS_OF_EXPERTS = re.compile(r"(^|\.)experts\.(\d+\.|gate_up_proj|gate_proj|up_proj|down_proj)")
"""Keys in the files that transformers must neither load nor report."""

TARGET_OF_EXPERTS = re.compile(r"(?<!\w)experts\\?\.(gate_up_proj|up_proj|down_proj)")
"""Matches targets of conversions that create stacked expert weights."""


class KTQuantizer(HfQuantizer):
    """The hooks that transformers calls when it loads and saves weights.

    ktops handles the experts. For everything else, each hook is forwarded to :attr:`other`.

    Attributes:
        other: the quantizer of all tensors except the experts; a :class:`PlainQuantizer` if they are plain.
        report: the :class:`ktops.integrations.loading.LoadReport`, once the experts are loaded.
    """

    report: LoadReport | None = None
    _parallel: ExpertParallel | None = None

    def __init__(self, quantization_config: KTConfig, **_) -> None:
        super().__init__(quantization_config, pre_quantized=True)
        self.other: HfQuantizer = PlainQuantizer(quantization_config)
        self._refusal: Exception | None = None
        self._missing_and_unexpected: tuple[set[str], set[str]] = set(), set()
        self._conversions: list | None = None
        if quantization_config.other is not None:
            with self._refusing():
                self.other = other_quantizer(quantization_config.other)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Stores the other quantizer's error, which is raised only if tensors need that quantizer."""
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
            raise ValueError("KTConfig: the weights must come from files. Otherwise, pass experts_path")
        require_whole_experts(model)
        if checkpoint_files:
            self._require_other(Path(checkpoint_files[0]).parent)
        self._path = Path(checkpoint_files[0]).parent if path is None else Path(path)
        modules = experts_modules(model)
        for name, source in model.all_tied_weights_keys.items():
            if name.rpartition(".")[0] in modules:
                raise ValueError(
                    f"KTConfig: {name} of {type(model).__name__} shares its weights with {source}; ktops "
                    "cannot load shared experts. Load the model without a KTConfig"
                )
        for module in modules.values():
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
        """Records the weights that transformers does not find in the files, because it only logs them.

        The experts' keys are removed from the unexpected ones, because ktops loads them.
        """
        adjust = model._adjust_missing_and_unexpected_keys

        def watched(*found) -> tuple[set[str], set[str]]:
            if self._conversions is None:  # before transformers 5.8, which asks no quantizer about them
                self._conversions = model._weight_conversions
            self._missing_and_unexpected = adjusted(
                adjust, found, ours=_sources_of_experts(self._conversions)
            )
            return self._missing_and_unexpected

        model.__dict__[WATCHED] = watched

    def update_weight_conversions(self, weight_conversions, *model):
        """Drops the conversions that would merge experts' weights; ktops keeps a copy of all to map names."""
        self._conversions = copy.deepcopy(weight_conversions)
        updated = self.other.update_weight_conversions(without_experts(weight_conversions), *model)
        if decodes_fp8(self.other):
            from ktops.integrations.transformers.fp8 import with_partial_blocks

            return with_partial_blocks(updated)
        return updated

    def postprocess_model(self, model, **kwargs):
        del model.__dict__[WATCHED]
        require_loaded(model, *self._missing_and_unexpected)
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
        self._parallel = ExpertParallel.of(model)
        self.report = load_layers(model, modules, layers, options, mmap=asked.mmap, parallel=self._parallel)
        peft.enable_if_installed()
        attach(model)
        return model

    @property
    def is_plain(self) -> bool:
        """True if only the experts are quantized."""
        return isinstance(self.other, PlainQuantizer)

    def is_serializable(self) -> bool:
        if self._parallel is not None:
            warn_once(
                "ktops: the model cannot be saved as a whole, because each process has a part of its "
                "experts. Adapters can be saved. To write the experts in a format: ktops convert"
            )
            return False
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


def _sources_of_experts(conversions: Iterable) -> list[re.Pattern]:
    """Returns patterns of the keys in the files that hold experts' weights."""
    sources = [
        re.compile(source.replace("*.", r".*\."))
        for conversion in conversions
        if _is_of_experts(conversion)
        for source in conversion.source_patterns
    ]
    return [KEYS_OF_EXPERTS, *sources]


def without_experts(conversions: Iterable) -> list:
    """Returns the conversions of transformers that do not create stacked expert weights."""
    return [conversion for conversion in conversions if not _is_of_experts(conversion)]


def _is_of_experts(conversion) -> bool:
    targets = getattr(conversion, "target_patterns", ())
    return any(TARGET_OF_EXPERTS.search(target) for target in targets)


def attach(model: nn.Module) -> None:
    """Sets the config, the quantizer and the conversions that ``save_pretrained`` uses.

    Args:
        model: any module; changes every PreTrainedModel in it that has experts in formats.
    """
    known: dict[PreTrainedModel, KTQuantizer] = {}
    for part in _with_formats(model):
        quantizer = known.get(part) or _quantizer(part)
        known |= dict.fromkeys(_with_formats(part), quantizer)
        part.hf_quantizer = quantizer
        part.config.quantization_config = quantizer.quantization_config
        part._weight_conversions = _conversions(part)


def _with_formats(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Yields the transformers models in a module whose experts are in formats, outermost first."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and any(isinstance(m, ExpertWeight) for m in part.modules()):
            yield part


def _quantizer(model: PreTrainedModel) -> KTQuantizer:
    """Returns the model's KTQuantizer, or a new one around the quantizer that loaded its other tensors."""
    found = getattr(model, "hf_quantizer", None)
    if isinstance(found, KTQuantizer):
        return found
    made = KTQuantizer(KTConfig())
    if found is not None:
        made.quantization_config.other = found.quantization_config
        made.other = found
    return made


def _conversions(model: PreTrainedModel) -> list[WeightConverter]:
    """Returns the conversions that transformers reverts when it saves the model: all except those of experts.

    Renamings are left out, so names match the state dict, which a Trainer expects when it resumes.
    """
    used = getattr(model, "_weight_conversions", None)
    if used is None:
        used = get_model_conversion_mapping(model, add_legacy=False)
    converters = (conversion for conversion in used if isinstance(conversion, WeightConverter))
    return [converter for converter in without_experts(converters) if _is_reversible(converter)]


def _is_reversible(converter: WeightConverter) -> bool:
    """True unless a quantizer's modules write their own tensors, as those of bitsandbytes do."""
    try:
        converter.reverse_transform()
    except NotImplementedError:
        return False
    return True
