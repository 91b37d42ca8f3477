"""Multi-head latent attention without expanding the cache for every token.

transformers caches one latent per token and, in every step, multiplies all of them by ``kv_b_proj`` for the
keys and values of every head. For a single query the same follows from the latents: the product of a query
with a key is that of ``W_k^T query`` with the latent, and the sum of values is ``W_v`` times the sum of latents.
"""

import functools

import torch
from torch import Tensor, nn

from ktops.nn.expert_list import is_plain_linear

EXPAND = "expand_kv"
"""The method of transformers' layers (5.24 and later) that makes keys and values of latents."""


def defer_expansion(model: nn.Module, attention: str) -> None:
    """Makes the layers of a model pass latents to the attention implementation of this name.

    With other implementations the layers expand them as before.
    """
    for module in model.modules():
        if hasattr(type(module), EXPAND) and hasattr(module, "kv_b_proj"):
            module.__dict__[EXPAND] = functools.partial(_expand_kv, module, attention)


def _expand_kv(layer: nn.Module, attention: str, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    if layer.config._attn_implementation == attention:
        return latents, rotated
    return getattr(type(layer), EXPAND)(layer, latents, rotated)


def is_latent(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Returns whether an attention function was given latents and rotated keys in place of keys and values."""
    return EXPAND in layer.__dict__ and (key.shape[1], value.shape[1]) == (1, 1) != query.shape[1:2]


def expand(layer: nn.Module, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Returns keys and values, as transformers does."""
    return getattr(type(layer), EXPAND)(layer, latents, rotated)


def can_absorb(layer: nn.Module, query: Tensor) -> bool:
    """Returns whether :func:`attend_latents` computes the same as with keys and values."""
    return query.shape[2] == 1 and is_plain_linear(layer.kv_b_proj) and layer.kv_b_proj.bias is None


def attend_latents(
    layer: nn.Module, query: Tensor, latents: Tensor, rotated: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Computes attention of a single query per sequence.

    Args:
        layer: its ``kv_b_proj`` holds W_k and W_v of every head.
        query: [B, heads, 1, D of keys + D of rotated keys].
        latents, rotated: [B, 1, S, rank], [B, 1, S, D of rotated keys].
        mask: [B or 1, heads or 1, 1, S], bool or added to the scores.
        scaling: factor of the scores.

    Returns:
        [B, 1, heads, D of values].
    """
    batch, heads, _, width = query.shape
    rank, key_width = latents.shape[-1], width - rotated.shape[-1]
    weight = layer.kv_b_proj.weight.view(heads, -1, rank)
    w_k, w_v = weight[:, :key_width], weight[:, key_width:]
    rows, rotated_rows = query.transpose(0, 2)[0].split(
        [key_width, width - key_width], dim=-1
    )  # [heads, B, ...]
    rows = torch.bmm(rows, w_k).transpose(0, 1)
    scores = torch.bmm(rows, latents[:, 0].mT).float()
    scores += torch.bmm(rotated_rows.transpose(0, 1), rotated[:, 0].mT)
    scores *= scaling
    if mask is not None:
        mask = mask[:, :, 0]
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        else:
            scores += mask
    sums = torch.bmm(scores.softmax(-1).to(query.dtype), latents[:, 0])  # [B, heads, rank]
    return torch.bmm(sums.transpose(0, 1), w_v.mT).transpose(0, 1)[:, None]
