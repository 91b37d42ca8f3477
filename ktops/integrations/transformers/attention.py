"""The entry "ktops" in transformers' attention interface."""

import functools
import inspect
import itertools
import re
import sys
from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.functional import pad

from ktops._warn import warn_once
from ktops.integrations.replacements import Replacements
from ktops.integrations.transformers.latent_attention import (
    attend_latents,
    defer_expansion,
    expand,
    is_latent,
    split_projection,
)
from ktops.integrations.transformers.single_query import attend_single

NAME = "ktops"
"""The name of the implementation: ``attn_implementation=NAME``."""

QUERY_BLOCK = 512
"""With a mask, that many queries at a time multiply the keys that any of them sees, on the CPU."""

_COMPARED = re.compile(r"_attn_implementation\s*(==|in\b|not in\b|!=(?! \"eager\":))")
"""What code contains that depends on the name. Models of 5.0 look up all but "eager" in the interface."""

_replaced = Replacements()

_NOT_COMPUTED = ("softcap", "sinks", "indices")
"""Arguments of some models' attention that SDPA does not have; transformers' sdpa would ignore some."""


def use_attention(model: nn.Module) -> str | None:
    """Switches a model of transformers to ``attn_implementation="ktops"``, which computes the same.

    On the CPU, no [T, T] matrix of scores exists then, and blocks of queries are not multiplied with keys
    that none of them sees. On a GPU, the model runs "sdpa", and takes packed sequences.

    Returns:
        Why the model keeps its own attention, or None.

    Example:
        >>> ktops.enable()
        >>> use_attention(model)
    """
    reason = why_not(model)
    if reason is None:
        cast(Any, model).set_attn_implementation(NAME)
        defer_expansion(model, NAME)
    return reason


def why_not(model: nn.Module) -> str | None:
    """Returns why a model cannot use "ktops"; None if it can."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return "it is not a model of transformers"
    implementation = model.config._attn_implementation
    if implementation not in ("sdpa", "eager", NAME):
        return f'it was loaded with attn_implementation="{implementation}"'
    for part in (part for part in model.modules() if isinstance(part, PreTrainedModel)):
        reason = _why_not_class(cast(Hashable, type(part)))
        if reason is not None:
            return reason
    return None


@functools.cache
def _why_not_class(model_class: Any) -> str | None:
    if not model_class._can_set_attn_implementation():
        return f"{model_class.__name__} does not use transformers' attention interface"
    if not (model_class._supports_sdpa or model_class._supports_flash_attn):
        return f"{model_class.__name__} has an attention of its own"
    if _COMPARED.search(inspect.getsource(sys.modules[model_class.__module__])):
        return f"{model_class.__name__} computes something else for each attention implementation"
    return None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Runs the attention of a layer with ``attn_implementation="ktops"``.

    Args:
        module: the layer; ``is_causal`` and ``num_key_value_groups`` are read.
        query, key, value: [B, heads, T, D], [B, key heads, S, D], [B, key heads, S, D of values]. The last
            dimensions may differ; for SDPA, the narrower are padded with zeros.
        attention_mask: [B or 1, heads or 1, T, S], bool or added to the scores. Without, attention is causal
            unless ``is_causal`` says otherwise.
        dropout, scaling, is_causal, kwargs: as in transformers' "sdpa".
        s_aux: [heads], the logits of attention sinks: a share of the softmax that goes to no value.
        cu_seq_lens_q, cu_seq_lens_k: [N + 1], where N sequences packed in one row (B = 1) start and end. None
            attends to another.

    Returns:
        [B, T, heads, D of values], and None.

    Raises:
        ValueError: the layer asks for what SDPA does not compute, or the lengths do not fit.
    """
    for name in _NOT_COMPUTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f'{type(module).__name__}: attn_implementation="{NAME}" cannot compute {name}; use "eager"'
            )
    if dropout and query.device.type == "cpu":
        warn_once("ktops: SDPA computes attention with dropout by explicit matrices on the CPU")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_latent(module, query, key, value):
        projection = split_projection(module, query)
        if projection is not None and _is_single(query, dropout, kwargs) and s_aux is None:
            return attend_latents(projection, query, key, value, attention_mask, scaling), None
        key, value = expand(module, key, value)
    width = value.shape[-1]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    arguments = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    tensors = (query, key, value, attention_mask, s_aux)
    if cu_seq_lens_q is None:
        output = _attend(module, *tensors, arguments)
    else:
        output = _attend_packed(module, *tensors, arguments, cu_seq_lens_q, cu_seq_lens_k)
    return output[..., :width], None


def _lengths(query: Tensor, key: Tensor, starts: Tensor, key_starts: Tensor | None) -> list[int]:
    """Returns the lengths of packed sequences that are not empty."""
    if key_starts is not None and key_starts is not starts and not torch.equal(starts, key_starts):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ, but each sequence attends to itself")
    lengths = starts.diff().tolist()
    if query.shape[0] != 1 or sum(lengths) != query.shape[2] or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"cu_seq_lens_q must divide one row of {query.shape[2]} queries and keys, got {starts.tolist()} "
            f"for {query.shape[0]} rows and {key.shape[2]} keys"
        )
    return [length for length in lengths if length]


@torch.compiler.disable  # else it would be compiled again for other lengths
def _attend_packed(
    module, query, key, value, mask: Tensor | None, sinks, arguments: dict, starts: Tensor, key_starts
) -> Tensor:
    if arguments.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__}: packed sequences cannot be combined with position_bias")
    lengths = _lengths(query, key, starts, key_starts)
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    parts = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    outputs = []
    for run, mask_part, *part in zip(runs, _diagonal(mask, sizes), *parts, strict=True):
        queries, keys, values = (_as_batch(tensor, *run) for tensor in part)
        masks = None if mask_part is None else torch.cat(_diagonal(mask_part, [run[0]] * run[1]))
        outputs.append(_attend(module, queries, keys, values, masks, sinks, arguments).flatten(0, 1))
    return torch.cat(outputs)[None]


def _as_batch(tensor: Tensor, length: int, count: int) -> Tensor:
    """Returns a view [count, heads, length, D] of a row [1, heads, count * length, D]."""
    return tensor[0].unflatten(1, (count, length)).transpose(0, 1)


def _diagonal(mask: Tensor | None, sizes: list[int]) -> list:
    """Returns the blocks on the diagonal of a mask; None for each of no mask."""
    if mask is None:
        return [None] * len(sizes)
    rows = mask.split(sizes, dim=2)
    return [row.split(sizes, dim=3)[i] for i, row in enumerate(rows)]


def _attend(module, query, key, value, mask: Tensor | None, sinks: Tensor | None, arguments: dict) -> Tensor:
    """Computes one sequence, or a batch of padded ones: [B, T, heads, D of queries or of values]."""
    if mask is None or not _divides(query, mask, arguments):
        return _attend_block(module, query, key, value, mask, sinks, arguments)
    outputs = []
    for rows, part in zip(query.split(QUERY_BLOCK, 2), mask.split(QUERY_BLOCK, 2), strict=True):
        seen = _seen(part)
        block = (rows, key[:, :, seen], value[:, :, seen], part[..., seen])
        outputs.append(_attend_block(module, *block, sinks, arguments))
    return torch.cat(outputs, dim=1)


def _attend_block(module, query, key, value, mask: Tensor | None, sinks: Tensor | None, arguments) -> Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _is_single(query, arguments["dropout"], arguments):
        return attend_single(query, key, value, mask, sinks, arguments["scaling"])
    causal = arguments["is_causal"] and mask is None and query.shape[2] > 1
    if sinks is not None:
        query, key, value, mask = _with_sinks(query, key, value, mask, sinks, arguments["scaling"], causal)
    if query.shape[2] > 1:
        width = max(query.shape[-1], value.shape[-1])
        query, key, value = (_widen(tensor, width) for tensor in (query, key, value))
    output, _ = sdpa_attention_forward(module, query, key, value, mask, **arguments)
    return output[:, 1:] if sinks is not None and causal else output


def _is_single(query: Tensor, dropout: float, others: dict) -> bool:
    """Returns whether this is a step of decoding on the CPU."""
    is_plain = not dropout and others.get("position_bias") is None
    return query.shape[2] == 1 and query.device.type == "cpu" and is_plain


def _with_sinks(query, key, value, mask: Tensor | None, sinks: Tensor, scaling: float, causal: bool):
    """Adds a first key whose score is the sink of each head and whose value is 0.

    The score is the product of one more dimension, where queries hold the sink and keys 0, except for the
    first. With a causal mask, a first query makes the others see it.
    """
    first = int(causal)
    column = (sinks / scaling).to(query.dtype).view(1, -1, 1, 1).expand(*query.shape[:-1], 1)
    query = pad(torch.cat((query, column), dim=-1), (0, 0, first, 0))
    sink = pad(key.new_ones(*key.shape[:2], 1, 1), (key.shape[-1], 0))
    key = torch.cat((sink, pad(key, (0, 1))), dim=2)
    value = pad(value, (0, 0, 1, 0))
    if mask is not None:
        mask = pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
    return query, key, value, mask


def _widen(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[-1]
    return pad(tensor, (0, missing)) if missing else tensor


def _divides(query: Tensor, mask: Tensor, arguments: dict) -> bool:
    """Returns whether queries are computed in blocks: on the CPU, where SDPA multiplies what a mask hides."""
    return (
        query.device.type == "cpu"
        and query.shape[2] > QUERY_BLOCK
        and mask.dtype == torch.bool
        and mask.shape[2] == query.shape[2]
        and arguments.get("position_bias") is None
        and not torch.compiler.is_compiling()
        and not is_fake(mask)
    )


def _seen(mask: Tensor) -> slice:
    """Returns the range of the keys that any query sees; one key at least."""
    keys = mask.any(dim=(0, 1, 2)).nonzero()
    return slice(0, 1) if not len(keys) else slice(int(keys[0]), int(keys[-1]) + 1)


def _get_correct_attn_implementation(model: Any, requested_attention: str | None, *args, **kwargs) -> str:
    """``PreTrainedModel.get_correct_attn_implementation``, which accepts every registered name."""
    reason = _why_not_class(cast(Hashable, type(model))) if requested_attention == NAME else None
    if reason is not None:
        raise ValueError(f'attn_implementation="{NAME}": {reason}')
    return _replaced.original["get_correct_attn_implementation"](model, requested_attention, *args, **kwargs)


def _registries() -> list:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return [ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS]


def enable() -> None:
    """Registers "ktops" with the masks of "sdpa"; a second call does nothing."""
    from transformers import PreTrainedModel
    from transformers.masking_utils import sdpa_mask

    for registry, function in zip(_registries(), (attention_forward, sdpa_mask), strict=True):
        registry.register(NAME, function)
    if not _replaced:
        _replaced.install(PreTrainedModel, get_correct_attn_implementation=_get_correct_attn_implementation)


def disable() -> None:
    """Unregisters the implementation. Models still set to it raise in forward."""
    for registry in _registries():
        registry._global_mapping.pop(NAME, None)
    _replaced.restore()
