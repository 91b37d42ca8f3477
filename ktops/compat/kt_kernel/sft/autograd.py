"""The names of KTransformers' module ``kt_kernel.sft.autograd``."""

import torch
from torch import Tensor

from ktops.compat.sft import Forward, SFTWrapper, grad_on_host, gradients, on_device


class KTMoEFunction(torch.autograd.Function):
    """The experts of a layer as a function for autograd, with the adapters of a ``KTMoEWrapper``.

    The gradients of the adapters go where ``wrapper.backward`` puts them: to the tensors given to
    ``init_lora_weights``, and to the ``.grad`` of Parameters. Every forward keeps what its own backward
    needs, so any number may come before a backward.
    """

    @staticmethod
    def forward(
        ctx,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        wrapper: SFTWrapper,
        lora_ref: Tensor | None = None,
        hidden_size: int | None = None,
        num_experts_per_tok: int | None = None,
        layer_idx: int | None = None,
        training: bool = True,
        train_lora: bool = True,
        all_qlens: object = None,
        *others: object,
    ) -> Tensor:
        """Runs the experts.

        Args:
            hidden_states: [..., H], on any device.
            topk_ids, topk_weights: [T, K].
            wrapper: of mode "sft", with weights and, unless its method skips them, adapters.
            lora_ref: any tensor that requires a gradient, so that backward runs although hidden_states
                requires none.
            hidden_size, num_experts_per_tok, layer_idx: those of the wrapper, which are used.
            training: whether a backward will follow.
            train_lora: False leaves the adapters' gradients alone.
            all_qlens, others: unused.

        Returns:
            The output with the shape, dtype and device of hidden_states.
        """
        inputs = wrapper._inputs(hidden_states.reshape(-1, wrapper.hidden_size), topk_ids, topk_weights)
        result = wrapper._compute(training, *inputs)
        ctx.wrapper, ctx.result, ctx.train_lora = wrapper, result, train_lora
        ctx.like = hidden_states.new_empty(0), topk_weights.new_empty(0), hidden_states.shape
        output = on_device(result.output.detach(), hidden_states.device)
        return output.to(hidden_states.dtype).reshape(hidden_states.shape)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        result: Forward = ctx.result
        if not result.output.requires_grad:
            raise RuntimeError("KTMoEFunction: no forward to differentiate: call apply with training=True")
        found = gradients(result, grad_on_host(grad_output.reshape(result.output.shape)))
        if not ctx.train_lora:
            found = found[:2]
        like, like_weights, shape = ctx.like
        grad_input, grad_weights = ctx.wrapper._publish(found, 1.0, like.device)
        grad_input, grad_weights = grad_input.to(like.dtype), grad_weights.to(like_weights.dtype)
        return grad_input.reshape(shape), None, grad_weights, *[None] * 13
