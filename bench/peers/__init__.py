"""ktops and its peers, one file each, for ``python -m bench.peers``."""

from dataclasses import dataclass, field

TRANSFORMERS, PEFT = "transformers_experts", "peft_lora"


@dataclass(frozen=True)
class Entry:
    """A contestant: its file in this folder, what it can do, and the process that runs it.

    home is "ktops" or "torch" for workers with this interpreter, otherwise the name of a user's environment.
    """

    name: str
    module: str
    modes: tuple[str, ...]
    home: str
    options: dict = field(default_factory=dict)


CONTESTANTS = (
    Entry("ktops", "ktops_op", ("forward", "training"), "ktops"),
    Entry("transformers eager", TRANSFORMERS, ("forward",), "torch", {"implementation": "eager"}),
    Entry("transformers grouped_mm", TRANSFORMERS, ("forward",), "torch", {"implementation": "grouped_mm"}),
    Entry("LoRA loop", "lora_loop", ("training",), "torch"),
    Entry("LoRA grouped_mm", "lora_grouped_mm", ("training",), "torch"),
    Entry("PEFT", PEFT, ("training",), "torch"),
    Entry("kt-kernel", "kt_kernel_moe", ("forward", "training"), "kt-kernel"),
    Entry("sglang", "sglang_moe", ("forward",), "sglang"),
    Entry("zentorch", "zentorch_moe", ("forward",), "zentorch"),
)

HOMES = ("kt-kernel", "sglang", "zentorch")
"""Peers that need a separate environment."""

PARITY = {
    "amx_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX", "KT_KERNEL_CPU_VARIANT": "amx"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "KT_KERNEL_CPU_VARIANT": "avx512_bf16"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "KT_KERNEL_CPU_VARIANT": "avx512_base"},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "KT_KERNEL_CPU_VARIANT": "avx2",
    },
    "scalar": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}
"""Maps each ISA of ktops, most instructions first, to the environment that restricts a peer to the same
instructions, as far as the peer allows."""

OBEYS = {
    "torch": "oneDNN and ATen limited",
    "kt-kernel": "its variant for these kernels",
    "sglang": "oneDNN limited, its own kernels are not",
    "zentorch": "oneDNN limited, its own kernels are not",
}

TUNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
"""Makes glibc keep large blocks instead of unmapping them and faulting them in again at each step."""
