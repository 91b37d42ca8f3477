"""Attention of a single query per sequence on the CPU, as in decoding."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend_single(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, scaling: float
) -> Tensor:
    """Computes attention with the queries that share keys as rows of one product.

    SDPA's kernel for the CPU takes 16 times as long for a row per head: it reads keys as slowly for one query
    as for many. With a head per query (latent attention), two products read keys and values faster than it
    does; like transformers' "eager", they round scores to the dtype of the query.

    Args:
        query, key, value: [B, heads, 1, D], [B, key heads, S, D], [B, key heads, S, D of values].
        mask: [B or 1, heads or 1, 1, S], bool or added to the scores.
        sinks: [heads], logits of a share of the softmax that goes to no value.
        scaling: factor of the scores.

    Returns:
        [B, 1, heads, D of values].
    """
    batch, heads, _, width = query.shape
    key_heads = key.shape[1]
    rows = query.reshape(batch, key_heads, heads // key_heads, width)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], key_heads, heads // key_heads, -1)
    if sinks is None and key_heads < heads and width == value.shape[-1]:
        output = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    else:
        output = _weights(rows, key, mask, sinks, scaling) @ value
    return output.reshape(batch, 1, heads, -1)


def _weights(rows: Tensor, key: Tensor, mask: Tensor | None, sinks: Tensor | None, scaling: float) -> Tensor:
    """Returns the softmax of the scores, [B, key heads, rows, S]."""
    scores = exact(rows @ key.mT) * scaling
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores += mask
    if sinks is None:
        return scores.softmax(-1).to(rows.dtype)
    column = sinks.to(scores.dtype).view(1, *rows.shape[1:3], 1).expand(rows.shape[0], -1, -1, -1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1].to(rows.dtype)


def exact(scores: Tensor) -> Tensor:
    """Returns scores in the dtype of their softmax, float32 or float64."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
