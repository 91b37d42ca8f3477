"""Modules built on the operators."""

from ktops.nn.expert_list import KTExpertList
from ktops.nn.expert_sequence import KTExpertSequence
from ktops.nn.experts import KTExperts

__all__ = ["KTExpertList", "KTExpertSequence", "KTExperts"]
