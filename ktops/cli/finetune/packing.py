"""Batches without padding: examples follow each other in one row, and do not see each other."""

from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from ktops.integrations.transformers.attention import NAME

_PROBE_LENGTHS = (5, 6, 5)
"""Longer than the kernels of convolutions along the sequence, which have 4 at most."""


class PackingCollator:
    """Makes one row of the examples of a batch, with the position in each and the length of each.

    The model gets what its attention needs to keep them apart: ``cu_seq_lens_q``. A mask of ones says that no
    token is padding.
    """

    def __init__(self) -> None:
        self.flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, Any]:
        batch = self.flatten(examples, return_tensors="pt")
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def why_padded(model) -> str | None:
    """Returns why sequences cannot be packed for a causal language model; None if they can.

    Three short sequences are tried, with NaN as the embeddings of the second. The logits of the others are
    finite only if nothing of it reaches them.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    if config._attn_implementation != NAME:
        return f'its attention is "{config._attn_implementation}", which does not keep them apart'
    if getattr(config, "attention_chunk_size", None) or "chunked_attention" in _layer_types(config):
        return "its attention works in chunks, which would begin at the row, not at each sequence"
    try:
        apart = _are_apart(base)
    except Exception as error:
        return f"{type(base).__name__} does not take packed sequences: {error}"
    return None if apart else "its layers carry a state from one sequence into the next"


def _layer_types(config) -> list[str]:
    return getattr(config, "layer_types", None) or []


@torch.no_grad()
def _are_apart(model) -> bool:
    embeddings = model.get_input_embeddings()
    examples = [{"input_ids": list(range(1, 1 + length))} for length in _PROBE_LENGTHS]
    batch = PackingCollator()(examples)
    device = next(embeddings.parameters()).device
    batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
    first, second, _ = _PROBE_LENGTHS
    poisoned = slice(first, first + second)

    def poison(module, args, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, poisoned] = torch.nan
        return output

    training = model.training
    hook = embeddings.register_forward_hook(poison)
    try:
        logits = model.eval()(**{**batch, "labels": None}, use_cache=False).logits
    finally:
        hook.remove()
        model.train(training)
    finite = logits[0].isfinite().all(-1)
    return bool(finite[: poisoned.start].all() and finite[poisoned.stop :].all())
