"""Checks that transformers found all of a model's weights, because it randomly initializes missing ones."""

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ktops.checkpoints.config import FROM_QUANTIZER
from ktops.checkpoints.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_NAMES = 4
"""Maximum number of tensor names that a message lists."""


def adjusted(
    adjust: Callable[..., Any], found: tuple, ours: Iterable[re.Pattern] = ()
) -> tuple[set[str], set[str]]:
    """Calls ``_adjust_missing_and_unexpected_keys``, the end of loading a model.

    Args:
        adjust: the method.
        found: its arguments: an object with both sets of names, which it changes; in transformers 5.0, the
            two sets, and it returns the changed ones.
        ours: names in the files that match one of these are not unexpected.

    Returns:
        The names that only the model has, and those that only the files have.
    """
    result = adjust(*found)
    info = found[0] if len(found) == 1 else None
    missing, unexpected = result if info is None else (info.missing_keys, info.unexpected_keys)
    unexpected = {name for name in unexpected if not any(pattern.search(name) for pattern in ours)}
    if info is not None:
        info.unexpected_keys = unexpected
    return missing, unexpected


def require_loaded(
    model: "PreTrainedModel", missing: Iterable[str], unexpected: Iterable[str], *, heads: bool = False
) -> None:
    """Checks the result of ``from_pretrained(..., output_loading_info=True)``.

    Args:
        model: a transformers model.
        missing: names of tensors that only the model has.
        unexpected: names of tensors that only the files have.
        heads: whether weights outside the base model must be present too; a new head has none.

    Raises:
        CheckpointError: weights were initialized at random, or were read as numbers without their scales.
    """
    base = "" if heads or not hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}."
    random = sorted(name for name in missing if name.startswith(base))
    if random:
        raise CheckpointError(
            f"{listed(random)} of {type(model).__name__}: not in the checkpoint, or in a form that "
            "config.json does not describe. The weights would be random"
        )
    modules = dict(model.named_modules())
    left = sorted(
        name for name in unexpected if name.endswith(FROM_QUANTIZER) and name.rpartition(".")[0] in modules
    )
    if left:
        raise CheckpointError(
            f"{listed(left)}: the weights of {type(model).__name__} are quantized, but config.json does not "
            "name the quantizer in quantization_config. They would be read without their scales"
        )


def listed(names: list[str]) -> str:
    """Returns the first names, and how many more follow."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
