"""Finds the experts of a model in checkpoint files, reads them, and writes quantized ones."""

from ktops.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ktops.checkpoints.config import converted_config
from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.layer import Layer, LayerWeights
from ktops.checkpoints.writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "Layer",
    "LayerWeights",
    "converted_config",
    "open_checkpoint",
]
