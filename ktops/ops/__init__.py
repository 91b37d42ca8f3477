"""The operators of the kt namespace, one file each: docstring, fake kernel, autograd, FLOP formula."""

from ktops.ops import dequantize, quantize  # noqa: F401  (registers both operators for tracing)
from ktops.ops.cpu_capability import cpu_capabilities, cpu_capability, use_isa, warn_of_refused_rows
from ktops.ops.memory import empty_cache, memory_stats
from ktops.ops.moe_sft import checkpoint_context_fn, moe_sft
from ktops.ops.profile import Profile, Step, profile

__all__ = [
    "Profile",
    "Step",
    "checkpoint_context_fn",
    "cpu_capabilities",
    "cpu_capability",
    "empty_cache",
    "memory_stats",
    "moe_sft",
    "profile",
    "use_isa",
    "warn_of_refused_rows",
]
