"""KTMoEWrapper: the experts of a layer with the API of KTransformers' kt-kernel."""

import math
from typing import ClassVar

import torch
from torch import Tensor

import ktops
from ktops._warn import warn_once
from ktops.compat.inference import InferenceWrapper
from ktops.compat.methods import find_method
from ktops.compat.sft import SFTWrapper
from ktops.ops.activation import ExpertFunction


class KTMoEWrapper:
    """The routed experts of one layer, for code written for KTransformers' ``kt_kernel.KTMoEWrapper``.

    A thin layer over :func:`ktops.moe_sft` that holds tensors where ``kt_kernel`` has C++ objects and shared
    buffers. ``docs/compat.md`` lists the methods and the differences.

    Args:
        layer_idx: the layer's number, in the names of a checkpoint and for deferred experts.
        num_experts, num_experts_per_tok, hidden_size, moe_intermediate_size: E, K, H, I.
        gpu_experts_mask: bool [E], experts that are computed elsewhere and skipped here. None means those
            with ids below num_gpu_experts.
        cpuinfer_threads, threadpool_count, numa_nodes: checked but not used, because ktops uses torch's
            threads. Warns if cpuinfer_threads differs from ``torch.get_num_threads()``. None means that.
        weight_path: the checkpoint for ``load_weights``, a directory or a GGUF file; may be None.
        chunked_prefill_size: stored but unused, because there are no buffers to size.
        cpu_save: True only issues a warning; ``ktops convert`` stores quantized checkpoints.
        max_deferred_experts_per_token: in mode "inference"; see InferenceWrapper. None means 0.
        method: how the experts are stored, one of ``ktops.compat.INFERENCE_METHODS`` or ``SFT_METHODS``.
        mode: "inference" or "sft".
        num_gpu_experts: the number of experts computed elsewhere; with a mask, the number in it, or 0.
        lora_rank, lora_alpha: in mode "sft", of the adapters; scaling = lora_alpha / lora_rank.
        max_cache_depth: in mode "sft", how many forwards may await their backward; older ones are discarded.
        group_size: for methods with "KGroup" in their names, and for GPTQ_INT4 when it quantizes.
        zero_point: False makes AMXINT4_1KGroup_SFT omit zero points, like AMXINT4_KGroup_SFT.
        prefix: prefix of the name of the layer's experts in the checkpoint, such as "thinker.model.";
            required if several layers have the number layer_idx.
        swiglu_limit: the limit of the activation "swiglu_clamped" (:func:`ktops.moe_sft`); 0 for none.
        swiglu_alpha: its alpha, with offset 1 (MiniMax-M3); 0 means alpha 1 and offset 0 (DeepSeek-V4). If
            both are 0, the activation is silu.
        lora_dropout, full_weight_grad: must have their defaults.

    Returns:
        An :class:`~ktops.compat.inference.InferenceWrapper` or an :class:`~ktops.compat.sft.SFTWrapper`.

    Raises:
        ValueError: unknown mode or method (the message lists the valid ones), or a wrong size; the message
            names the argument.

    Example:
        >>> wrapper = KTMoEWrapper(
        ...     0, 8, 2, 64, 32, None, torch.get_num_threads(), 1, None, 512, method="AMXINT4"
        ... )
        >>> gate, up, down = torch.randn(8, 32, 64), torch.randn(8, 32, 64), torch.randn(8, 64, 32)
        >>> wrapper.load_weights_from_tensors(gate, up, down)
        >>> weights, ids = torch.randn(5, 8).softmax(-1).topk(2)
        >>> wrapper.forward(torch.randn(5, 64), ids, weights).shape
        torch.Size([5, 64])
    """

    _capture_batch_sizes: ClassVar[list[int]] = []

    def __new__(  # type: ignore[misc]  # a factory with the name of a class
        cls,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: Tensor | None = None,
        cpuinfer_threads: int | None = None,
        threadpool_count: int = 1,
        weight_path: str | None = None,
        chunked_prefill_size: int = 0,
        cpu_save: bool = False,
        max_deferred_experts_per_token: int | None = None,
        method: str = "AMXINT4",
        numa_nodes: list[int] | None = None,
        mode: str = "inference",
        num_gpu_experts: int = 0,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        max_cache_depth: int = 1,
        group_size: int = 128,
        zero_point: bool = True,
        *,
        prefix: str | None = None,
        lora_dropout: float = 0.0,
        full_weight_grad: bool = False,
        swiglu_limit: float = 0.0,
        swiglu_alpha: float = 0.0,
    ) -> InferenceWrapper | SFTWrapper:
        storage = find_method(mode, method)
        if "1KGroup" in method and not zero_point:
            storage = storage._replace(format="int4")
        _refuse(
            lora_dropout=(lora_dropout, "dropout on the experts' adapters is not supported"),
            full_weight_grad=(full_weight_grad, "ktops.nn.KTExperts trains the experts themselves"),
        )
        if cpu_save:
            warn_once("KTMoEWrapper: cpu_save=True stores nothing: use `ktops convert`")
        options = {
            "layer_idx": layer_idx,
            "num_experts": num_experts,
            "num_experts_per_tok": num_experts_per_tok,
            "hidden_size": hidden_size,
            "moe_intermediate_size": moe_intermediate_size,
            "gpu_experts_mask": gpu_experts_mask,
            "cpuinfer_threads": torch.get_num_threads() if cpuinfer_threads is None else cpuinfer_threads,
            "threadpool_count": threadpool_count,
            "weight_path": weight_path,
            "prefix": prefix,
            "chunked_prefill_size": chunked_prefill_size,
            "numa_nodes": numa_nodes,
            "group_size": group_size,
            "num_gpu_experts": num_gpu_experts,
            "function": _function(swiglu_limit, swiglu_alpha),
        }
        if mode == "inference":
            return InferenceWrapper(
                method, storage, max_deferred_experts_per_token=max_deferred_experts_per_token, **options
            )
        return SFTWrapper(
            method,
            storage,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            max_cache_depth=max_cache_depth,
            **options,
        )

    @staticmethod
    def set_capture_batch_sizes(capture_bs: list[int]) -> None:
        """Stores batch sizes for :meth:`get_capture_batch_sizes`. Captures take the memory they need."""
        if any(size < 1 for size in capture_bs):
            raise ValueError(f"KTMoEWrapper: capture_bs must be positive, got {capture_bs}")
        KTMoEWrapper._capture_batch_sizes = list(capture_bs)

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """Returns the batch sizes last passed to :meth:`set_capture_batch_sizes`."""
        return list(KTMoEWrapper._capture_batch_sizes)

    @staticmethod
    def clear_buffer_cache() -> None:
        """Returns scratch memory to the system; see :func:`ktops.empty_cache`."""
        ktops.empty_cache()

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        """Calls :func:`ktops.empty_cache`. Keeps tensors saved for backward, which are not a cache."""
        ktops.empty_cache()


def _function(swiglu_limit: float, swiglu_alpha: float) -> ExpertFunction:
    for name, value in (("swiglu_limit", swiglu_limit), ("swiglu_alpha", swiglu_alpha)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"KTMoEWrapper: {name} must be finite and not negative, got {value}")
    if not swiglu_limit and not swiglu_alpha:
        return ExpertFunction()
    limit = swiglu_limit or torch.finfo(torch.float32).max
    alpha, offset = (swiglu_alpha, 1.0) if swiglu_alpha else (1.0, 0.0)
    return ExpertFunction("swiglu_clamped", (limit, alpha, offset))


def _refuse(**arguments: tuple[float, str]) -> None:
    for name, (value, reason) in arguments.items():
        if value:
            raise ValueError(f"KTMoEWrapper: {name} must be {type(value)(0)!r}, got {value!r}: {reason}")
