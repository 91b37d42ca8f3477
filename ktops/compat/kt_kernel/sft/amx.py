"""The names of KTransformers' module ``kt_kernel.sft.amx``."""

from ktops.compat.sft import SFTWrapper
from ktops.compat.wrapper import KTMoEWrapper


class AMXSFTMoEWrapper(KTMoEWrapper):
    """``KTMoEWrapper(mode="sft")`` with its arguments in another order.

    Example:
        >>> wrapper = AMXSFTMoEWrapper(0, 8, 2, 64, 32, 0, torch.get_num_threads(), 1, None, 512, lora_rank=8)
    """

    def __new__(  # type: ignore[misc]  # a factory with the name of a class
        cls,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        num_gpu_experts: int = 0,
        cpuinfer_threads: int | None = None,
        threadpool_count: int = 1,
        weight_path: str | None = None,
        chunked_prefill_size: int = 0,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        max_cache_depth: int = 1,
        method: str = "AMXBF16_SFT",
        group_size: int = 128,
        zero_point: bool = True,
        full_weight_grad: bool = False,
        swiglu_limit: float = 0.0,
    ) -> SFTWrapper:
        made = KTMoEWrapper(
            layer_idx,
            num_experts,
            num_experts_per_tok,
            hidden_size,
            moe_intermediate_size,
            None,
            cpuinfer_threads,
            threadpool_count,
            weight_path,
            chunked_prefill_size,
            method=method,
            mode="sft",
            num_gpu_experts=num_gpu_experts,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            max_cache_depth=max_cache_depth,
            group_size=group_size,
            zero_point=zero_point,
            full_weight_grad=full_weight_grad,
            swiglu_limit=swiglu_limit,
        )
        assert isinstance(made, SFTWrapper)
        return made
