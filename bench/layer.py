"""The weights of one measured layer and the inputs of its calls."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.shapes import Shape

_POOL = 1_000_003  # prime: no two rows of a weight start at the same place of the pool


def random_(tensor: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Fills a contiguous tensor with normal numbers of a small pool, at the speed of a copy; returns it."""
    flat = tensor.view(-1)
    pool = (torch.randn(min(_POOL, flat.numel()), generator=generator) * scale).to(tensor.dtype)
    for start in range(0, flat.numel(), _POOL):
        chunk = flat[start : start + _POOL]
        chunk.copy_(pool[: chunk.numel()])
    return tensor


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call that differ from call to call; grad_output [T, H] is for training."""

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    grad_output: Tensor

    @property
    def distinct_experts(self) -> int:
        """Experts with at least one token."""
        return self.topk_ids.unique().numel()


class Layer:
    """Weights of one shape in bfloat16, with LoRA adapters made on demand, and a source of fresh inputs.

    Few routes deal the experts like a deck of cards, so that an expert's weights have left the caches when it
    comes again; with more routes than experts every token draws its own.

    Example:
        >>> layer = Layer(SHAPES["qwen3_30b"], seed=0)
        >>> inputs = layer.inputs(tokens=16)
    """

    def __init__(self, shape: Shape, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = shape, dtype
        self.generator = torch.Generator().manual_seed(seed)
        h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts
        self.gate_up_proj = self._random((e, 2 * i, h), h**-0.5)
        self.down_proj = self._random((e, h, i), i**-0.5)
        self._adapters: dict[int, dict[str, Tensor]] = {}
        self._deck = torch.randperm(e, generator=self.generator)
        self._dealt = 0

    def _random(self, size: tuple[int, ...], scale: float) -> Tensor:
        return random_(torch.empty(size, dtype=self.dtype), scale, self.generator)

    def adapters(self, rank: int) -> dict[str, Tensor]:
        """The LoRA arguments of ktops.moe_sft for a rank, all requiring gradients; {} for rank 0."""
        if rank == 0:
            return {}
        if rank not in self._adapters:
            h, i, e = self.shape.hidden_size, self.shape.intermediate_size, self.shape.num_experts
            self._adapters[rank] = {
                "gate_up_lora_A": self._random((e, rank, h), h**-0.5).requires_grad_(),
                "gate_up_lora_B": self._random((e, 2 * i, rank), rank**-0.5).requires_grad_(),
                "down_lora_A": self._random((e, rank, i), i**-0.5).requires_grad_(),
                "down_lora_B": self._random((e, h, rank), rank**-0.5).requires_grad_(),
            }
        return self._adapters[rank]

    def inputs(self, tokens: int) -> Inputs:
        """Inputs that no call has seen before."""
        h = self.shape.hidden_size
        logits = torch.randn(tokens, self.shape.top_k, generator=self.generator)
        return Inputs(
            self._random((tokens, h), 1.0),
            self._topk_ids(tokens),
            logits.softmax(1).to(self.dtype),
            self._random((tokens, h), 1.0),
        )

    def _topk_ids(self, tokens: int) -> Tensor:
        experts, top_k = self.shape.num_experts, self.shape.top_k
        routes = tokens * top_k
        if routes <= experts:
            cards = (self._dealt + torch.arange(routes)) % experts
            self._dealt = (self._dealt + routes) % experts
            return self._deck[cards].view(tokens, top_k)
        return torch.rand(tokens, experts, generator=self.generator).topk(top_k, dim=1).indices
