"""Checks that transformers found all of a model's weights, because it randomly initializes missing ones."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ktops.checkpoints.config import FROM_QUANTIZER
from ktops.checkpoints.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_NAMES = 4
"""Maximum number of tensor names that a message lists."""


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
