"""The experts implementation "ktops" of transformers."""

from ktops.integrations.transformers.architectures import (
    activation_name,
    unsupported_layout,
    unsupported_tensors,
)
from ktops.integrations.transformers.experts import NAME, disable, enable, runs_ktops

__all__ = [
    "NAME",
    "activation_name",
    "disable",
    "enable",
    "runs_ktops",
    "unsupported_layout",
    "unsupported_tensors",
]
