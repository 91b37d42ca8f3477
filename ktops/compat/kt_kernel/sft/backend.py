"""The names of KTransformers' module ``kt_kernel.sft.backend``: its backends, and what runs them here."""

from dataclasses import dataclass
from typing import Any

import ktops
from ktops.integrations.settings import BACKENDS

INT8_BACKEND = "INT8"
INT8_SFT_METHOD = "INT8_SFT"
FP8_BACKEND = "FP8"
FP8_SFT_METHOD = "AMXFP8_SFT"
RAWINT4_BACKEND = "RAWINT4"
RAWINT4_SFT_METHOD = "RAWINT4_SFT"
RAWINT4_GROUP_SIZE = 32
RAWINT4_WEIGHT_LAYOUT = "compressed-tensors-rawint4-g32-v1"
MXFP4_SFT_METHOD = "MXFP4_SFT"


@dataclass(frozen=True)
class Runtime:
    """What computes the experts of a backend.

    Attributes:
        cpu_variant: the kernels in use, as ``ktops.cpu_capability()`` names them.
        kernel: the operator.
        weight_layout: the weight format, as ``ktops.formats`` names it.
    """

    cpu_variant: str
    kernel: str
    weight_layout: str


INT8Runtime = FP8Runtime = RAWINT4Runtime = MXFP4Runtime = Runtime


@dataclass(frozen=True)
class RAWINT4CheckpointContract:
    """How a checkpoint stores int4 experts, in groups of ``group_size`` columns with a scale each."""

    bits: int = 4
    group_size: int = RAWINT4_GROUP_SIZE
    signed: bool = True
    symmetric: bool = True
    zero_point: bool = False
    format: str = "pack-quantized"


def _runtime(backend: str) -> Runtime:
    weight_format = BACKENDS[backend].format
    assert weight_format is not None
    return Runtime(ktops.cpu_capability(), "kt::moe_sft_fwd", weight_format)


def get_int8_runtime() -> Runtime:
    """Returns what computes experts in int8."""
    return _runtime("INT8")


def get_fp8_runtime() -> Runtime:
    """Returns what computes experts in fp8 with blocks of 128 x 128."""
    return _runtime("FP8")


def get_rawint4_runtime() -> Runtime:
    """Returns what computes experts in int4 with groups of 32."""
    return _runtime("RAWINT4")


def get_mxfp4_runtime() -> Runtime:
    """Returns what computes experts in MXFP4."""
    return _runtime("MXFP4")


def get_rawint4_checkpoint_contract(model_config: Any) -> RAWINT4CheckpointContract:
    """Returns how a checkpoint stores its int4 experts.

    Raises:
        ValueError: its quantization_config is not that of compressed-tensors' symmetric pack-quantized int4.
    """
    text = getattr(model_config, "text_config", None)
    config = getattr(model_config, "quantization_config", None) or getattr(text, "quantization_config", None)
    config = config if isinstance(config, dict) else getattr(config, "to_dict", dict)()
    groups = [group.get("weights") or {} for group in config.get("config_groups", {}).values()]
    schemes = {(each.get("num_bits"), each.get("symmetric", True), each.get("group_size")) for each in groups}
    bits, symmetric, size = schemes.pop() if len(schemes) == 1 else (None, None, None)
    if config.get("format") != "pack-quantized" or (bits, symmetric) != (4, True) or size is None:
        raise ValueError(
            "RAWINT4 needs a checkpoint of compressed-tensors with format pack-quantized and symmetric int4 "
            f"in groups of one size, got quantization_config {config}"
        )
    return RAWINT4CheckpointContract(group_size=size)
