"""Weight formats, one module per family, with the same names as in ``ktops_csrc/formats``."""

from ktops.formats import floating, gguf_blocks, integer, k_quants, plain
from ktops.formats.expert_weight import ExpertWeight
from ktops.formats.format import METHODS, Codes, Format
from ktops.formats.quantize import dequantize, quantize
from ktops.formats.registry import get_format, names, register

for _module in (plain, integer, floating, gguf_blocks, k_quants):
    for _format in _module.FORMATS:
        register(_format)

__all__ = [
    "METHODS",
    "Codes",
    "ExpertWeight",
    "Format",
    "dequantize",
    "get_format",
    "names",
    "quantize",
    "register",
]
