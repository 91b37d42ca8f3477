"""The error of this package."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read: the message names the tensor and the file."""


class UnknownScheme(CheckpointError):
    """Tensors that ktops does not know the meaning of."""
