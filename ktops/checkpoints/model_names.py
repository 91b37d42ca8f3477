"""ModelNames: maps names of experts' tensors like transformers itself, using its conversion table."""

import copy
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktops._warn import warn_once
from ktops.checkpoints.names import (
    EVERY_EXPERT,
    FUSED,
    GGUF,
    PROJECTIONS,
    Key,
    layer_number,
    parse,
    parse_tensor,
)
from ktops.checkpoints.quantization_config import without_quantization
from ktops.nn.expert_sequence import KTExpertSequence
from ktops.nn.find import find_experts
from ktops.nn.layout import declared_gating
from ktops.ops.activation import CONCATENATED, INTERLEAVED

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

OF_EXPERT = re.compile(r"(?:(?<=\.)|^)experts\.(\d+)(?=\.)")
TENSORS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
MATRICES = ("gate_proj", "up_proj", "down_proj", "w1", "w3", "w2")


class ModelNames:
    """Maps tensors of a checkpoint to the experts of a model that transformers would load them into.

    Args:
        model: a PreTrainedModel on any device; ktops may have replaced its experts.
        modules: its experts by name.
        conversions: transformers' renamings and conversions; default: those of the model.

    Attributes:
        modules: the experts, by the names that they had before ktops wrapped them.

    Example:
        >>> names = ModelNames(model, experts_modules(model))
        >>> names.key("model.layers.3.block_sparse_moe.input_linear.weight").projection
        'gate_up'
    """

    def __init__(
        self, model: "PreTrainedModel", modules: dict[str, nn.Module], conversions: list | None = None
    ) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        if conversions is None:
            from transformers.conversion_mapping import get_model_conversion_mapping

            conversions = get_model_conversion_mapping(model)
        conversions = copy.deepcopy(conversions)
        self._renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        self._converters = [each for each in conversions if isinstance(each, WeightConverter)]
        for each in self._converters:
            each.compiled_sources = _of_whole_names(each)
        self._by_pattern = {p: each for each in self._converters for p in each.source_patterns}
        self._prefix = model.base_model_prefix
        self._ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
        owners = {name: _owner(model, name) for name in modules}
        self.modules = {owners[name]: module for name, module in modules.items()}
        self.names = {owner: name for name, owner in owners.items()}
        keys = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        for name in self.modules:
            keys |= {f"{name}.{tensor}" for tensor in TENSORS}
            keys |= {f"{name}.0.{matrix}.weight" for matrix in MATRICES}
        self._keys = dict.fromkeys(keys, True)
        self._resolved: dict[str, Key | None] = {}
        self._following: dict[str | None, tuple[str, Any]] = {}

    def key(self, name: str) -> Key | None:
        """Parses the name of an expert's tensor, in this model or not; None for any other tensor."""
        if GGUF.fullmatch(name):
            return parse(name)
        expert = OF_EXPERT.search(name)
        first = name if expert is None else f"{name[: expert.start(1)]}0{name[expert.end(1) :]}"
        if first not in self._resolved:
            self._resolved[first] = self._resolve(first)
        key = self._resolved[first]
        if key is None:
            return parse(name)
        return key if expert is None or key.expert == EVERY_EXPERT else self._of_expert(key, int(expert[1]))

    def _of_expert(self, key: Key, expert: int) -> Key:
        """Returns the key of another expert, given that of the first.

        Ernie-VL numbers the experts of vision after those of text.
        """
        following, count = self._following.get(key.module, ("", 0))
        if not following or expert < count:
            return key._replace(expert=expert)
        return key._replace(experts=following, module=following, expert=expert - count)

    def renamed(self, name: str) -> str:
        """Returns the name in the model of a tensor that does not belong to experts."""
        return self._rename(name)[0]

    def ignored(self, name: str) -> bool:
        """True if transformers silently skips a tensor of this name, as it does with MTP layers."""
        return any(pattern.search(name) for pattern in self._ignored)

    def _resolve(self, name: str) -> Key | None:
        for dense, tensor in _dense_names(name):
            renamed, pattern = self._rename(dense)
            key = self._converted(name, renamed, pattern) if pattern else self._renamed(name, renamed)
            if key is not None:
                return key if tensor is None else key._replace(tensor=tensor)
        return None

    def _rename(self, name: str) -> tuple[str, str | None]:
        """Returns the name in the model, and the source pattern of the conversion that applies, if any."""
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._keys
        )
        if renamed not in self._keys and name in self._keys:
            return rename_source_key(name, [], [], self._prefix, self._keys)
        return renamed, pattern

    def _renamed(self, name: str, renamed: str) -> Key | None:
        """Returns the key of a tensor that is loaded unchanged."""
        for module, rest in _splits(renamed):
            if module in self.modules:
                found = parse_tensor(rest)
                return None if found is None else self._key(name, module, *found)
        return None

    def _converted(self, name: str, renamed: str, pattern: str) -> Key | None:
        """Returns the key of a tensor that is loaded through operations."""
        converter = self._by_pattern[pattern]
        module, _, target = renamed.rpartition(".")
        fused = FUSED.fullmatch(target)
        if module not in self.modules or fused is None:
            return None
        operations = list(converter.operations)
        kinds = [type(operation).__name__ for operation in operations]
        sources = converter.source_patterns
        expert, suffix = EVERY_EXPERT, ""
        if kinds[:1] == ["MergeModulelist"]:
            if OF_EXPERT.search(name) is None:
                return None
            expert, kinds, operations = 0, kinds[1:], operations[1:]
        stored = re.search(r"_weight_?(\w*)$", name)
        if kinds[:1] == ["Inkling2LoopDequantizeExperts"] and stored is not None:
            kinds, operations, sources, suffix = kinds[1:], operations[1:], [pattern], stored[1]
        projection, tensor, layout = PROJECTIONS[fused[1]], fused[2] or suffix or "weight", None
        if projection == "gate_up" and len(sources) == 2 and kinds == ["Concatenate"]:
            projection = ("gate", "up")[sources.index(pattern)]
        elif kinds == ["Interleave"] and len(sources) == 1 and not operations[0].inverse:
            layout = INTERLEAVED
        elif kinds == ["ErnieFuseAndSplitTextVisionExperts"] and OF_EXPERT.search(name):
            text, vision = converter.target_patterns
            following = self.names[renamed.replace(text, vision).rpartition(".")[0]]
            self._following[self.names[module]] = following, self.modules[module].num_experts
            projection = ("gate", "up")[sources.index(pattern)] if len(sources) == 2 else projection
            return self._key(name, module, 0, projection, tensor)._replace(experts=self.names[module])
        elif kinds not in ([], ["Transpose"]) or len(sources) > 1 or len(converter.target_patterns) > 1:
            layout = ", ".join(kinds)
        return self._key(name, module, expert, projection, tensor, layout)

    def _key(self, name, module, expert, projection, tensor, layout=None) -> Key:
        layer = layer_number(module)
        gating = _gating(self.modules[module])
        names = self.names[module], gating, layout or gating
        return Key(_experts(name), -1 if layer is None else layer, expert, projection, tensor, *names)


def config_names(config: dict) -> ModelNames | None:
    """Returns the names of the model that config.json describes; None if transformers has no such model."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        return None
    if model_type not in CONFIG_MAPPING:
        return None
    try:
        model = empty_model(config)
        return None if model is None else ModelNames(model, find_experts(model))
    except Exception as error:
        warn_once(
            f"ktops: transformers cannot create the {model_type!r} model that config.json describes, so "
            f"ktops looks for experts under the usual names: {type(error).__name__}: {error}"
        )
        return None


def empty_model(config: dict) -> "PreTrainedModel | None":
    """Returns the transformers model that config.json describes, without weights.

    Returns:
        The model on the meta device; None if transformers has no class for it.

    Raises:
        Exception: whatever transformers raises for a config that it cannot use.
    """
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    classes = (getattr(transformers, name, None) for name in names if isinstance(name, str))
    model_class: type[PreTrainedModel] | None = next((c for c in classes if isinstance(c, type)), None)
    decoded = transformers.PreTrainedConfig._decode_special_floats(without_quantization(config))
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(decoded)
    with torch.device("meta"), no_init_weights():
        if model_class is not None:
            return model_class._from_config(parsed)
        for auto in (AutoModelForCausalLM, AutoModel):
            if type(parsed) in auto._model_mapping:
                return auto.from_config(parsed)
    return None


def pretrained_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the outermost transformers models in a model, by name; often the model itself, ""."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return {}
    parts: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(part == "" or name.startswith(f"{part}.") for part in parts)
        if not inside and isinstance(module, transformers.PreTrainedModel):
            parts[name] = module
    return parts


def _of_whole_names(converter: "WeightConverter") -> re.Pattern:
    """Returns a pattern for the source names of a conversion that does not match the beginning of a name.

    Before transformers 5.21, a pattern for ``weight`` matches ``weight_scale_inv`` too.
    """
    found = converter.compiled_sources
    return found if r"(?!\w)" in found.pattern else re.compile(rf"(?:{found.pattern})(?!\w)")


def _owner(model: nn.Module, name: str) -> str:
    """Returns the name that the experts had before ktops wrapped them."""
    parent, _, _ = name.rpartition(".")
    return parent if isinstance(model.get_submodule(parent), KTExpertSequence) else name


def _gating(experts: nn.Module) -> str:
    """Returns the gating of experts of transformers, or of ktops in place of them."""
    options = getattr(experts, "options", None)
    return declared_gating(experts) if options is None else options.get("gating", CONCATENATED)


def _dense_names(name: str) -> Iterator[tuple[str, str | None]]:
    """Yields the names of dense weights, which transformers' table contains, that a tensor may belong to, and
    which of the weight's tensors it is, or None if the renamed name tells."""
    yield name, None
    owner, _, tensor = name.rpartition(".")
    if tensor != "weight":
        yield f"{owner}.weight", tensor
    yield owner, tensor
    fused = re.fullmatch(r"(.+\.(?:gate_up_proj|gate_proj|up_proj|down_proj))_(\w+)", name)
    if fused:
        yield fused[1], fused[2]


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yields (module, rest) for every dot where the module's name could end, longest first."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:count]), ".".join(parts[count:])


def _experts(name: str) -> str:
    """Returns the part of a tensor's name that all tensors of its experts share."""
    parts = name.split(".")
    end = len(parts) - parts[::-1].index("experts") if "experts" in parts else len(parts) - 2
    return ".".join(parts[:end])
