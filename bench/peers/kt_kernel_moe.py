"""kt-kernel's inference class AMXBF16_MOE, and KTMoEWrapper in SFT mode."""

from typing import Any

import torch
from kt_kernel import KTMoEWrapper, kt_kernel_ext
from torch import Tensor

from bench.layer import Inputs, Layer

MAX_TOKENS = 2048  # kt-kernel allocates buffers for this many tokens
PROJECTIONS = ("gate", "up", "down")


class Contestant:
    """Provides forward with the C++ inference class, which has no LoRA, and training with the SFT wrapper.

    The wrapper has separate A for gate and up, so both get the layer's A and their gradients are added.
    """

    def __init__(self, layer: Layer, rank: int) -> None:
        self.layer, self.rank = layer, rank
        self.sft_method = "AMXBF16_SFT"
        self.sft_options: dict[str, Any] = {}
        shape = layer.shape
        self.sizes = (shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size)
        self.gate, self.up = (half.contiguous() for half in layer.gate_up_proj.chunk(2, dim=1))
        self.down = layer.down_proj
        self.experts = torch.arange(shape.num_experts)
        del layer.gate_up_proj
        self._inference: Any = None
        self._wrapper: Any = None

    def _make_inference(self):
        pool = kt_kernel_ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map = 1, [0]
        pool.subpool_thread_count = [torch.get_num_threads()]
        self._cpu = kt_kernel_ext.CPUInfer(pool)
        config = kt_kernel_ext.moe.MOEConfig(*self.sizes, 0)
        config.layer_idx, config.pool, config.max_len = 0, self._cpu.backend_, MAX_TOKENS
        moe = self._make_moe(config)
        self._cpu.submit(moe.load_weights_task(self.experts.data_ptr()))
        self._cpu.sync()
        return moe

    def _make_moe(self, config):
        """Returns the inference class, with the weights for it to load."""
        for name in PROJECTIONS:
            setattr(config, f"{name}_proj", getattr(self, name).data_ptr())
        return kt_kernel_ext.moe.AMXBF16_MOE(config)

    def forward(self, inputs: Inputs) -> Tensor:
        if self._inference is None:
            self._inference = self._make_inference()
        tokens, top_k = inputs.topk_ids.shape
        output, weights = torch.empty_like(inputs.hidden_states), inputs.topk_weights.float()
        size = torch.tensor([tokens], dtype=torch.int32)
        task = self._inference.forward_task(
            size.data_ptr(), top_k, inputs.topk_ids.data_ptr(), weights.data_ptr(),
            inputs.hidden_states.data_ptr(), output.data_ptr(), False,
        )  # fmt: skip
        self._cpu.submit(task)
        self._cpu.sync()
        return output

    def _make_wrapper(self):
        num_experts, top_k, hidden_size, intermediate_size = self.sizes
        wrapper = KTMoEWrapper(
            layer_idx=0, num_experts=num_experts, num_experts_per_tok=top_k, hidden_size=hidden_size,
            moe_intermediate_size=intermediate_size, gpu_experts_mask=None,
            cpuinfer_threads=torch.get_num_threads(), threadpool_count=1, weight_path="",
            chunked_prefill_size=MAX_TOKENS, mode="sft", method=self.sft_method, lora_rank=self.rank,
            lora_alpha=float(self.rank), **self.sft_options,
        )  # fmt: skip
        self._load(wrapper)
        a1, b1, a2, b2 = (factor.detach() for factor in self.layer.adapters(self.rank).values())
        gate_b, up_b = (half.contiguous() for half in b1.chunk(2, dim=1))
        self.factors = [a1, gate_b, a1.clone(), up_b, a2, b2]
        self.grads = [torch.zeros_like(factor) for factor in self.factors]
        wrapper.init_lora_weights(*self.factors, *self.grads)
        return wrapper

    def _load(self, wrapper) -> None:
        wrapper.load_weights_from_tensors(self.gate, self.up, self.down, self.experts)

    def training(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the output and the gradients by the names of ktops.ops.arguments.GRADIENTS."""
        if self._wrapper is None:
            self._wrapper = self._make_wrapper()
        output = self._wrapper.forward(inputs.hidden_states, inputs.topk_ids, inputs.topk_weights)
        grad_input, grad_weights = self._wrapper.backward(inputs.grad_output)
        gate_a, gate_b, up_a, up_b, down_a, down_b = self.grads
        return output, {
            "hidden_states": grad_input,
            "topk_weights": grad_weights,
            "gate_up_lora_A": gate_a + up_a,
            "gate_up_lora_B": torch.cat([gate_b, up_b], dim=1),
            "down_lora_A": down_a,
            "down_lora_B": down_b,
        }
