"""Finds the layer of a checkpoint by the experts module of a model, or by layer number."""

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from ktops.checkpoints.checkpoint import Checkpoint
from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.layer import Layer
from ktops.checkpoints.model_names import ModelNames, pretrained_parts
from ktops.checkpoints.names import family, layer_number


def match_layers(
    checkpoint: Checkpoint,
    model: nn.Module,
    modules: dict[str, nn.Module],
    *,
    prefix: str | None = None,
    conversions: list | None = None,
) -> dict[str, Layer]:
    """Returns the layer of a checkpoint for every experts module of a model.

    A layer matches if transformers would load it into the module, or if it has the same name as the module.
    If no layer matches, as in a GGUF file, layers are matched by number, provided that the checkpoint has the
    layers of only one part of a model.

    Args:
        modules: the experts of the model by name.
        prefix: consider only layers whose names in the checkpoint start with this.
        conversions: the conversions that transformers loads the model with; default: those of the model.

    Raises:
        CheckpointError: the layer of a module is missing, or several match.
        ValueError: several modules of the model have the same layer number.

    Example:
        >>> match_layers(open_checkpoint("Qwen3-Next-80B-A3B"), model, experts_modules(model))
        {'model.layers.0.mlp.experts': Layer('model.layers.0.mlp.experts', bf16, 512 experts), ...}
    """
    found: dict[str, list[Layer]] = defaultdict(list)
    left: dict[str, Layer] = {}
    parts = pretrained_parts(model)
    for part, root in parts.items():
        start = f"{part}." if part else ""
        inside = {name.removeprefix(start): m for name, m in modules.items() if name.startswith(start)}
        names = ModelNames(root, inside, conversions)
        for layer in _beginning_with(prefix, checkpoint.named_by(names)):
            if layer.module is not None:
                found[start + layer.module].append(layer)
            elif prefix is not None or not names.ignored(layer.name):
                left[layer.name] = layer
    if not parts:
        left = {layer.name: layer for layer in _beginning_with(prefix, checkpoint)}
        found.update({name: [left[name]] for name in modules if name in left})
    if found:
        for layers in found.values():
            layers[0].check()
        return {name: _one(found.get(name, []), layer_number(name), checkpoint, name) for name in modules}
    return _by_number(list(left.values()), modules, checkpoint)


def numbered_layer(checkpoint: Checkpoint, index: int, prefix: str | None = None) -> Layer:
    """Returns the layer with this number, preferring one that transformers loads over an MTP layer.

    Raises:
        CheckpointError: no layer matches, or several match.
    """
    layers = [layer for layer in _beginning_with(prefix, checkpoint) if layer.index == index]
    of_model = [layer for layer in layers if layer.module is not None]
    return _one(of_model if len(layers) > 1 and of_model else layers, index, checkpoint)


def _beginning_with(prefix: str | None, checkpoint: Checkpoint) -> list[Layer]:
    checkpoint.require_layers()
    chosen = [layer for layer in checkpoint.layers if layer.name.startswith(prefix or "")]
    if not chosen:
        raise CheckpointError(
            f"{checkpoint.path}: no experts have a name that starts with prefix={prefix!r}; there are "
            f"{_parts(checkpoint.layers)}"
        )
    return chosen


def _one(layers: list[Layer], number: int | None, checkpoint: Checkpoint, name: str | None = None) -> Layer:
    """Returns the single layer of the list; number and name of the module are for error messages."""
    what = f"layer {number}" if name is None else name
    if len(layers) > 1:
        names = " and ".join(layer.name for layer in layers)
        raise CheckpointError(
            f"{checkpoint.path}: the experts of {what} could be {names}. Pass prefix=, the beginning of the "
            "right name"
        )
    if not layers:
        which = "its experts" if number is None else f"the experts of layer {number}"
        raise CheckpointError(
            f"{what}: {which} are missing in {checkpoint.path}, which has experts of "
            f"{_parts(checkpoint.layers)}"
        )
    return layers[0]


def _by_number(
    layers: list[Layer], modules: dict[str, nn.Module], checkpoint: Checkpoint
) -> dict[str, Layer]:
    families = {family(layer.name) for layer in layers}
    if len(families) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: it does not have the names of the model's experts, {next(iter(modules))}, "
            f"and the experts could be any of {_parts(layers)}. Pass prefix=, the beginning of the right name"
        )
    numbers: dict[int, str] = {}
    for name in modules:
        number = layer_number(name)
        if number is None:
            raise ValueError(
                f"load_experts: {name} must be in a numbered layer, such as model.layers.3.mlp.experts, or "
                "the checkpoint must use its name"
            )
        if number in numbers:
            raise ValueError(
                f"load_experts: layer {number} of {checkpoint.path} could be {numbers[number]} or {name} of "
                "the model. Pass only the right part of the model"
            )
        numbers[number] = name
    by_number: dict[int, list[Layer]] = defaultdict(list)
    for layer in layers:
        by_number[layer.index].append(layer)
    return {name: _one(by_number[number], number, checkpoint, name) for number, name in numbers.items()}


def _parts(layers: Iterable[Layer]) -> str:
    """Formats layers for messages: "model.layers.{0 to 47} and mtp.layers.{0}"."""
    indices: dict[str, list[int]] = defaultdict(list)
    for layer in layers:
        indices[family(layer.name)].append(layer.index)
    spans = (
        f"{name}{{{min(of)}{f' to {max(of)}' if max(of) > min(of) else ''}}}" for name, of in indices.items()
    )
    return " and ".join(spans) or "no experts"
