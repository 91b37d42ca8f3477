"""Multi-head latent attention without expanding the cache for every token.

transformers caches one latent per token and, in every step, multiplies all of them by ``kv_b_proj`` for the
keys and values of every head. For a single query the same follows from the latents: the product of a query
with a key is that of ``W_k^T query`` with the latent, and the sum of values is W_v times the sum of latents.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ktops.integrations.transformers.single_query import exact
from ktops.nn.expert_list import interception, is_plain_linear
from ktops.nn.frozen_lora import FrozenLoraLinear

EXPAND = "expand_kv"
"""The method of transformers' layers (5.24 and later) that makes keys and values of latents."""


def defer_expansion(model: nn.Module, attention: str) -> None:
    """Makes the layers of a model pass latents to the attention implementation of this name.

    With other implementations the layers expand them as before.
    """
    for module in model.modules():
        if hasattr(type(module), EXPAND) and hasattr(module, "kv_b_proj"):
            module.__dict__[EXPAND] = functools.partial(_expand_kv, module, attention)


def _expand_kv(layer: Any, attention: str, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    if layer.config._attn_implementation == attention:
        return latents, rotated
    return expand(layer, latents, rotated)


def is_latent(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Returns whether an attention function was given latents and rotated keys, not keys and values."""
    return EXPAND in layer.__dict__ and key.shape[1] == value.shape[1] == 1


def expand(layer: nn.Module, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Returns keys and values, as transformers does."""
    return getattr(type(layer), EXPAND)(layer, latents, rotated)


class Projection(NamedTuple):
    """``kv_b_proj`` by heads, with the LoRA adapters on it.

    Products are with all rows of a head, for keys and for values: PyTorch would copy some of them first,
    which takes longer than to multiply the others as well.

    Attributes:
        weight: [heads, D of keys + D of values, rank].
        adapters: (A [r, rank], B [heads, D of keys + D of values, r], scaling) of each.
    """

    weight: Tensor
    adapters: list[tuple[Tensor, Tensor, float]]

    def values(self, latents: Tensor, key_width: int) -> Tensor:
        """Returns W_v times latents, [heads, B, rank] -> [heads, B, D of values]."""
        product = torch.bmm(latents, self.weight.mT)
        for a, b, scaling in self.adapters:
            low_rank = latents.to(a.dtype).flatten(0, 1) @ a.mT
            product += scaling * torch.bmm(low_rank.view(*latents.shape[:2], -1), b.mT)
        return product[..., key_width:]

    def latent_queries(self, queries: Tensor) -> Tensor:
        """Returns the transpose of W_k times queries, [heads, B, D of keys] -> [heads, B, rank]."""
        rows = pad(queries, (0, self.weight.shape[1] - queries.shape[2]))
        product = torch.bmm(rows, self.weight)
        for a, b, scaling in self.adapters:
            low_rank = torch.bmm(rows.to(b.dtype), b)
            product += scaling * (low_rank.flatten(0, 1) @ a).view_as(product)
        return product


def split_projection(layer: Any, query: Tensor) -> Projection | None:
    """Returns the projection of a layer for a single query [B, heads, 1, D]; None if it must run as a whole.

    That is the case with hooks, other adapters than plain LoRA, quantized weights, in training mode.
    """
    linear, adapters = layer.kv_b_proj, []
    if query.shape[2] != 1 or layer.training:
        return None
    if isinstance(linear, FrozenLoraLinear):
        if interception(linear):
            return None
        adapters.append(_by_heads(query, linear.lora_A, linear.lora_B, linear.scaling))
        linear = linear.base_layer
    elif hasattr(linear, "lora_A"):
        if interception(linear) or linear.merged:
            return None
        names = () if linear.disable_adapters else linear.active_adapters
        for name in (name for name in names if name in linear.lora_A):
            a, b = linear.lora_A[name], linear.lora_B[name]
            if name in linear.lora_variant or not (is_plain_linear(a) and is_plain_linear(b)):
                return None
            if b.bias is not None:
                return None
            adapters.append(_by_heads(query, a.weight, b.weight, linear.scaling[name]))
        linear = linear.base_layer
    if not is_plain_linear(linear) or linear.bias is not None:
        return None
    return Projection(linear.weight.view(query.shape[1], -1, linear.in_features), adapters)


def _by_heads(query: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor, float]:
    """Returns an adapter with the rows of B by heads, in a dtype no narrower than that of the query."""
    dtype = torch.promote_types(a.dtype, query.dtype)
    return a.to(dtype), b.view(query.shape[1], -1, b.shape[1]).to(dtype), scaling


def attend_latents(
    projection: Projection,
    query: Tensor,
    latents: Tensor,
    rotated: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Computes attention of a single query per sequence.

    Args:
        projection: of the layer.
        query: [B, heads, 1, D of keys + D of rotated keys].
        latents, rotated: [B, 1, S, rank], [B, 1, S, D of rotated keys].
        mask: [B or 1, heads or 1, 1, S], bool or added to the scores.
        scaling: factor of the scores.

    Returns:
        [B, 1, heads, D of values].
    """
    width = query.shape[3] - rotated.shape[3]
    rows, rotated_rows = query[:, :, 0].split([width, rotated.shape[3]], dim=-1)
    rows = projection.latent_queries(rows.transpose(0, 1)).transpose(0, 1)
    scores = exact(torch.bmm(rows, latents[:, 0].mT))  # [B, heads, S]
    scores += torch.bmm(rotated_rows, rotated[:, 0].mT)
    scores *= scaling
    if mask is not None:
        mask = mask[:, :, 0]
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        else:
            scores += mask
    sums = torch.bmm(scores.softmax(-1).to(query.dtype), latents[:, 0])
    return projection.values(sums.transpose(0, 1), width).transpose(0, 1)[:, None]
