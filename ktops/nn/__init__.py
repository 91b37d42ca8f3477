"""Modules built on the operators."""

from ktops.nn.expert_list import KTExpertList
from ktops.nn.expert_sequence import KTExpertSequence
from ktops.nn.experts import KTExperts
from ktops.nn.int8_linear import Int8Linear

__all__ = ["Int8Linear", "KTExpertList", "KTExpertSequence", "KTExperts"]
