"""Draws which experts tokens choose, and counts the routes of ranks."""

import torch
from torch import Tensor

from bench.shapes import Shape


def draw(shape: Shape, tokens: int, draws: int, skew: float = 0.0, seed: int = 0) -> Tensor:
    """Draws the experts of tokens, [draws, T, K] int64: each token has K different experts.

    The popularity of the n-th most popular expert is proportional to n^-skew; which expert that is changes
    from draw to draw, because nothing relates popularity to the rank that holds an expert. 0: all are alike.

    Example:
        >>> draw(Shape("", 1, 1, 4, 2), tokens=3, draws=5).shape
        torch.Size([5, 3, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    popularity = -skew * torch.arange(1, shape.num_experts + 1, dtype=torch.float64).log()
    drawn = []
    for _ in range(draws):
        logits = popularity[torch.randperm(shape.num_experts, generator=generator)]
        uniform = torch.rand(tokens, shape.num_experts, generator=generator, dtype=torch.float64)
        gumbel = -(-uniform.clamp_min(1e-300).log()).log()
        drawn.append((logits + gumbel).topk(shape.top_k, dim=1).indices)
    return torch.stack(drawn)


def counts(topk_ids: Tensor, num_experts: int, ranks: int) -> Tensor:
    """Returns the routes from each rank's tokens to each expert, [draws, ranks, E] int64.

    Rank r has the r-th of ``ranks`` parts of the tokens, as ``tensor_split`` divides them.

    Args:
        topk_ids: [draws, T, K].
    """
    draws = topk_ids.shape[0]
    counted = topk_ids.new_zeros(draws, ranks, num_experts)
    for rank, part in enumerate(topk_ids.tensor_split(ranks, dim=1)):
        chosen = part.reshape(draws, -1)
        counted[:, rank].scatter_add_(1, chosen, torch.ones_like(chosen))
    return counted


def traffic(counted: Tensor) -> Tensor:
    """Returns the routes from each rank's tokens to each rank's experts, [draws, from, to] int64.

    Args:
        counted: the result of :func:`counts`; a rank holds a contiguous range of E / ranks experts.
    """
    draws, ranks, num_experts = counted.shape
    return counted.view(draws, ranks, ranks, num_experts // ranks).sum(dim=3)
