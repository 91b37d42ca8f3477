"""The method names of KTMoEWrapper and the weight format of each."""

from typing import NamedTuple

from ktops.integrations.settings import BACKENDS


class Method(NamedTuple):
    """How a method stores the experts.

    Attributes:
        format: one of ``ktops.formats.names()``; "" for the format of the file (LLAMAFILE).
        group_size: number of columns that share a scale; 0 for a whole row, None for the ``group_size`` of
            the constructor.
        schemes: checkpoint schemes, as ``ktops.checkpoints`` names them, whose experts are used unchanged.
        trains_lora: for SFT methods, whether the experts have adapters.
    """

    format: str
    group_size: int | None = 0
    schemes: tuple[str, ...] = ()
    trains_lora: bool = True


MODES = ("inference", "sft")

INFERENCE_METHODS = {
    "AMXINT4": Method("int4"),
    "AMXINT8": Method("int8"),
    "MOE_INT4": Method("int4"),
    "MOE_INT8": Method("int8"),
    "RAWINT4": Method("int4", 32, ("pack-quantized",)),
    "FP8": Method("fp8_e4m3", 128),
    "FP8_PERCHANNEL": Method("fp8_e4m3"),
    "GPTQ_INT4": Method("uint4", None, ("gptq", "awq")),
    "MXFP4": Method("mxfp4", 32),
    "MXFP8": Method("mxfp8", 32),
    "BF16": Method("bf16"),
    "LLAMAFILE": Method(""),
}

_SFT_METHODS = {
    f"{name}_SFT": Method(backend.format or "", *backend[1:]) for name, backend in BACKENDS.items()
}

SFT_METHODS = _SFT_METHODS | {
    f"{name}_SkipLoRA": method._replace(trains_lora=False) for name, method in _SFT_METHODS.items()
}


def find_method(mode: str, name: str) -> Method:
    """Returns the method with this name.

    Raises:
        ValueError: unknown mode, or the mode has no such method; the message lists the valid ones.
    """
    if mode not in MODES:
        raise ValueError(f"KTMoEWrapper: mode must be one of {', '.join(MODES)}, got {mode!r}")
    methods = INFERENCE_METHODS if mode == "inference" else SFT_METHODS
    if name not in methods:
        raise ValueError(
            f"KTMoEWrapper: method must be one of {', '.join(methods)} in mode {mode!r}, got {name!r}"
        )
    return methods[name]
