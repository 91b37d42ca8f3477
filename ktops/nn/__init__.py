"""Modules over the operators."""

from ktops.nn.experts import KTExperts

__all__ = ["KTExperts"]
