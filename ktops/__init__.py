"""PyTorch operators for Mixture-of-Experts layers on the CPU: LoRA and full fine-tuning, and inference."""

import importlib

from ktops import _library, devices, nn, numa  # noqa: F401  (registers the kt operators)
from ktops._version import __version__
from ktops.formats import ExpertWeight, dequantize, quantize
from ktops.ops import (
    Profile,
    Step,
    checkpoint_context_fn,
    cpu_capabilities,
    cpu_capability,
    empty_cache,
    memory_stats,
    moe_sft,
    profile,
    use_isa,
    warn_of_refused_rows,
)

_LAZY = {
    "KTConfig": "ktops.integrations.transformers.config",
    "TrainingState": "ktops.integrations.transformers.training_state",
    "chunk_loss": "ktops.integrations.chunked_loss",
    "count_routes": "ktops.integrations.gpu_experts",
    "disable": "ktops.integrations",
    "enable": "ktops.integrations",
    "export_adapter": "ktops.adapters.export",
    "freeze_adapters": "ktops.integrations.freeze_adapters",
    "load_experts": "ktops.integrations.load_experts",
    "merge_adapter": "ktops.adapters.merge",
    "numa_placement": "ktops.integrations.numa_placement",
    "offload_experts": "ktops.integrations.offload",
    "quantize_experts": "ktops.integrations.quantize_experts",
    "quantize_linear": "ktops.integrations.linear_format",
    "stream_experts": "ktops.integrations.stream_experts",
    "swap_experts": "ktops.integrations.swap",
    "unswap_experts": "ktops.integrations.swap",
}

_LAZY_MODULES = ("checkpoints", "compat", "integrations")

__all__ = [
    "ExpertWeight",
    "KTConfig",
    "Profile",
    "Step",
    "TrainingState",
    "__version__",
    "checkpoint_context_fn",
    "chunk_loss",
    "count_routes",
    "cpu_capabilities",
    "cpu_capability",
    "dequantize",
    "disable",
    "empty_cache",
    "enable",
    "export_adapter",
    "freeze_adapters",
    "load_experts",
    "memory_stats",
    "merge_adapter",
    "moe_sft",
    "numa_placement",
    "offload_experts",
    "profile",
    "quantize",
    "quantize_experts",
    "quantize_linear",
    "stream_experts",
    "swap_experts",
    "unswap_experts",
    "use_isa",
]

warn_of_refused_rows()
numa.bind_if_asked()


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"ktops.{name}")
    raise AttributeError(f"module 'ktops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})
