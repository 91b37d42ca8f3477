"""The weights of one measured layer and the inputs of its calls."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.shapes import LAYOUTS, PLAIN, Layout, Shape

_POOL = 1_000_003  # prime, so that no two rows of a weight start at the same place in the pool

ROUTINGS = ("random", "skewed")
"""How tokens choose experts: evenly, or with expert 0 chosen by half of the tokens."""


@dataclass(frozen=True)
class Variant:
    """How a layer is called: the LoRA rank of both adapters (0: none), what forward saves, what is trained.

    full also requests the gradients of gate_up_proj, down_proj and the biases. layout is a name in LAYOUTS.
    """

    rank: int = 0
    save: str = "activations"
    full: bool = False
    routing: str = "random"
    layout: str = "plain"

    @property
    def experts(self) -> Layout:
        return LAYOUTS[self.layout]


def random_(tensor: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Fills a contiguous tensor with normal numbers from a small pool, at the speed of a copy; returns it."""
    flat = tensor.view(-1)
    pool = (torch.randn(min(_POOL, flat.numel()), generator=generator) * scale).to(tensor.dtype)
    for start in range(0, flat.numel(), _POOL):
        chunk = flat[start : start + _POOL]
        chunk.copy_(pool[: chunk.numel()])
    return tensor


@dataclass(frozen=True)
class Inputs:
    """The arguments that differ from call to call; grad_output, like the output, is for training."""

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    grad_output: Tensor

    @property
    def distinct_experts(self) -> int:
        """The number of experts with at least one token."""
        return self.topk_ids.unique().numel()


class Layer:
    """Weights of one shape, with LoRA adapters created on demand, and a source of fresh inputs.

    All layouts share one memory, so that what is in the caches does not depend on the layout.
    With few routes, experts are dealt like a deck of cards, so that an expert's weights have left the caches
    before it is used again. With more routes than experts, every token draws its own.

    Example:
        >>> layer = Layer(SHAPES["qwen3_30b"], seed=0)
        >>> inputs = layer.inputs(tokens=16)
    """

    def __init__(self, shape: Shape, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self._start(shape, seed, dtype)
        h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts
        self.gate_up_proj = self._random((e, 2 * i, h), h**-0.5)
        self.down_proj = self._random((e, h, i), i**-0.5)

    def _start(self, shape: Shape, seed: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self._adapters: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._biases: tuple[Tensor, ...] = ()
        self._deck = torch.randperm(shape.num_experts, generator=self.generator)
        self._dealt = 0

    def write(self, file: Path, rank: int) -> None:
        """Writes the weights and the adapters of a rank, for :meth:`read` in another process."""
        weights = {"gate_up_proj": self.gate_up_proj, "down_proj": self.down_proj}
        adapters = {name: tensor.detach() for name, tensor in self.adapters(rank).items()}
        state = {"shape": asdict(self.shape), "rank": rank, "weights": weights, "adapters": adapters}
        torch.save(state, file)

    @classmethod
    def read(cls, file: Path, *, seed: int = 0, copy: bool = False) -> "Layer":
        """Reads the layer that :meth:`write` wrote: maps the file, or copies it to memory of this process."""
        state = torch.load(file, mmap=True, weights_only=True)

        def take(tensor: Tensor) -> Tensor:
            return tensor.clone() if copy else tensor

        layer = cls.__new__(cls)
        layer._start(Shape(**state["shape"]), seed, state["weights"]["down_proj"].dtype)
        layer.gate_up_proj = take(state["weights"]["gate_up_proj"])
        layer.down_proj = take(state["weights"]["down_proj"])
        if state["rank"]:
            adapters = {name: take(tensor).requires_grad_() for name, tensor in state["adapters"].items()}
            layer._adapters[state["rank"], PLAIN.gate_up_rows(layer.shape)] = adapters
        return layer

    def _random(self, size: tuple[int, ...], scale: float) -> Tensor:
        return random_(torch.empty(size, dtype=self.dtype), scale, self.generator)

    def weights(self, layout: Layout) -> dict[str, Any]:
        """Returns the weights and biases of ktops.moe_sft in a layout, as views of the same memory.

        Weights in a format have the plain layout.
        """
        if layout == PLAIN:
            return {"gate_up_proj": self.gate_up_proj, "down_proj": self.down_proj}
        h, i, e = self.shape.hidden_size, self.shape.intermediate_size, self.shape.num_experts
        rows = layout.gate_up_rows(self.shape)

        def view(weight: Tensor, *size: int) -> Tensor:
            memory = weight.view(-1)[: math.prod(size)]
            return memory.view(size[0], size[2], size[1]).mT if layout.transposed else memory.view(size)

        weights = {
            "gate_up_proj": view(self.gate_up_proj, e, rows, h),
            "down_proj": view(self.down_proj, e, h, i),
        }
        if layout.bias:
            if not self._biases:
                self._biases = (self._random((e, 2 * i), 0.5), self._random((e, h), 0.5))
            gate_up_bias, down_bias = self._biases
            weights |= {"gate_up_bias": gate_up_bias[:, :rows], "down_bias": down_bias}
        return weights

    def adapters(self, rank: int, layout: Layout = PLAIN) -> dict[str, Any]:
        """Returns the LoRA arguments of ktops.moe_sft for a rank, all requiring gradients; {} for rank 0."""
        if rank == 0:
            return {}
        rows = layout.gate_up_rows(self.shape)
        if (rank, rows) not in self._adapters:
            h, i, e = self.shape.hidden_size, self.shape.intermediate_size, self.shape.num_experts
            self._adapters[rank, rows] = {
                "gate_up_lora_A": self._random((e, rank, h), h**-0.5).requires_grad_(),
                "gate_up_lora_B": self._random((e, rows, rank), rank**-0.5).requires_grad_(),
                "down_lora_A": self._random((e, rank, i), i**-0.5).requires_grad_(),
                "down_lora_B": self._random((e, h, rank), rank**-0.5).requires_grad_(),
            }
        return self._adapters[rank, rows]

    def inputs(self, tokens: int, routing: str = "random", layout: Layout = PLAIN) -> Inputs:
        """Returns inputs that no call has used before; routing is one of ROUTINGS."""
        h = self.shape.hidden_size
        logits = torch.randn(tokens, self.shape.top_k, generator=self.generator)
        return Inputs(
            self._random((tokens, h), 1.0),
            self._topk_ids(tokens, routing),
            logits.softmax(1).to(self.dtype),
            self._random(layout.output_size(self.shape, tokens), 1.0),
        )

    def _topk_ids(self, tokens: int, routing: str) -> Tensor:
        experts, top_k = self.shape.num_experts, self.shape.top_k
        routes = tokens * top_k
        if routing == "skewed":
            scores = torch.rand(tokens, experts, generator=self.generator)
            scores[:, 0] = torch.where(torch.arange(tokens) % 2 == 0, 2.0, -1.0)
            return scores.topk(top_k, dim=1).indices
        if routes <= experts:
            cards = (self._dealt + torch.arange(routes)) % experts
            self._dealt = (self._dealt + routes) % experts
            return self._deck[cards].view(tokens, top_k)
        return torch.rand(tokens, experts, generator=self.generator).topk(top_k, dim=1).indices
