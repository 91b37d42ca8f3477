"""The names of KTransformers' module ``kt_kernel``; :func:`ktops.compat.install` makes it importable."""

import importlib

import ktops
from ktops.compat import kt_kernel_ext
from ktops.compat.finder import VERSION as __version__
from ktops.compat.masks import generate_gpu_experts_masks
from ktops.compat.wrapper import KTMoEWrapper

__all__ = [
    "AMXSFTMoEWrapper",
    "KTMoEWrapper",
    "__cpu_variant__",
    "__version__",
    "generate_gpu_experts_masks",
    "kt_kernel_ext",
]

VARIANTS = {"amx_bf16": "amx", "avx512": "avx512_base"}
"""kt_kernel's names of instruction sets, where they are not those of :func:`ktops.cpu_capability`."""

__cpu_variant__ = VARIANTS.get(ktops.cpu_capability(), ktops.cpu_capability())


def __getattr__(name: str):
    if name == "AMXSFTMoEWrapper":  # kt_kernel.sft needs transformers, which a server may not have
        return importlib.import_module("ktops.compat.kt_kernel.sft.amx").AMXSFTMoEWrapper
    raise AttributeError(
        f"ktops does not serve kt_kernel.{name}; it serves {', '.join(__all__)} and kt_kernel.sft"
    )
