"""Errors of this package."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the tensor and the file."""


class UnknownScheme(CheckpointError):
    """ktops does not know what the tensors mean."""
