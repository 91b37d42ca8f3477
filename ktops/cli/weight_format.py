"""Finds the experts of a checkpoint in a weight format, with errors for the option that names the format."""

from pathlib import Path

from ktops.checkpoints import Checkpoint, CheckpointError, Layer, open_checkpoint
from ktops.checkpoints.checkpoint import MANIFEST
from ktops.checkpoints.config import is_ktops, quantization_of
from ktops.checkpoints.experts import Experts, Requantized
from ktops.cli.errors import UserError
from ktops.formats.plain import PLAIN

OPTION = "--weight-format"

ADVICE = "Leave the option out, or name the original model"

InFormat = list[tuple[Layer, tuple[Experts, Experts]]]
"""Layers, and their gate_up_proj and down_proj in a format."""


def open_source(path: str | Path) -> Checkpoint:
    """Opens a checkpoint.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        return open_checkpoint(path)
    except CheckpointError as error:
        raise UserError(str(error)) from None


def experts_in_format(
    checkpoint: Checkpoint,
    weight_format: str,
    group_size: int | None = None,
    method: str | None = None,
    advice: str = ADVICE,
) -> InFormat:
    """Returns the experts of all layers in a format; they are quantized when they are read.

    Args:
        checkpoint: where they are.
        weight_format, group_size, method: as in :func:`ktops.quantize`.
        advice: as in :func:`require_one_loss`.

    Raises:
        UserError: the format cannot hold the experts, a file is damaged, or see :func:`require_one_loss`.
    """
    found: InFormat = []
    for layer in checkpoint.layers:
        try:
            both = layer.experts(weight_format, group_size=group_size, method=method or "rtn")
        except (CheckpointError, ImportError) as error:
            raise UserError(str(error)) from None
        except ValueError as error:
            raise UserError(f"{OPTION} {weight_format}: {layer.name}: {error}") from None
        require_one_loss(checkpoint, both, advice)
        found.append((layer, both))
    return found


def require_one_loss(checkpoint: Checkpoint, experts: tuple[Experts, Experts], advice: str = ADVICE) -> None:
    """Raises UserError if experts that ktops has quantized would be quantized to another format.

    Published models whose experts are quantized are a source like any other, and to decode is no loss.

    Args:
        checkpoint: where the experts come from.
        experts: in the other format.
        advice: what to do instead, for the message.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if not is_ktops(quantization_of(checkpoint.config)) and not (folder / MANIFEST).is_file():
        return
    plain = set(PLAIN.values())
    for each in experts:
        if isinstance(each, Requantized) and plain.isdisjoint((each.format, each.source.format)):
            group = f", group {each.source.group_size}" if each.source.group_size else ""
            raise UserError(
                f"{OPTION} {each.format}: the experts in {checkpoint.path} are already quantized, to "
                f"{each.source.format}{group}. {advice}"
            )
