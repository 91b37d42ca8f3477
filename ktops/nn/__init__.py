"""Modules over the operators."""

from ktops.nn.expert_list import KTExpertList
from ktops.nn.experts import KTExperts

__all__ = ["KTExpertList", "KTExperts"]
