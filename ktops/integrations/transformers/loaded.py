"""Whether transformers has found all of a model's weights in the files: it makes others anew, at random."""

from collections.abc import Iterable

from torch import nn

from ktops.checkpoints.config import SCALES
from ktops.checkpoints.errors import CheckpointError

MOST_NAMES = 4
"""Names of tensors that a message lists."""


def require_loaded(
    model: nn.Module, missing: Iterable[str], unexpected: Iterable[str], *, heads: bool = False
) -> None:
    """Checks what ``from_pretrained(..., output_loading_info=True)`` says.

    Args:
        model: a transformers model.
        missing: names of tensors that it has and the files do not.
        unexpected: names of tensors that the files have and it does not.
        heads: whether what is outside of the base model must be there too; a head to be trained is not.

    Raises:
        CheckpointError: weights were made at random, or are codes whose scales were left in the files.
    """
    base = "" if heads or not hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}."
    random = sorted(name for name in missing if name.startswith(base))
    if random:
        raise CheckpointError(
            f"{listed(random)} of {type(model).__name__}: not in the checkpoint, or not in a form that "
            "config.json tells how to read: the weights would be random"
        )
    modules = dict(model.named_modules())
    left = sorted(name for name in unexpected if name.endswith(SCALES) and name.rpartition(".")[0] in modules)
    if left:
        raise CheckpointError(
            f"{listed(left)}: the weights of {type(model).__name__} are quantized, but config.json does not "
            "name the quantizer in quantization_config: they would be read as they lie"
        )


def listed(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
