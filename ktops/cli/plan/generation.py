"""Counts the memory of `ktops chat`."""

from collections import Counter

import torch
from torch import nn

from ktops.cli.plan.trace import MemoryTrace, Traced, fake

CACHE = "KV cache"
PROMPT = "activations of the prompt"


def trace_generation(model: nn.Module, context: int) -> Traced:
    """Counts the memory of a conversation of ``context`` tokens, read at once.

    Args:
        model: from weights.build.
    """
    with fake(model), torch.no_grad():
        trace = MemoryTrace(model)
        with trace:
            ids = torch.zeros(1, context, dtype=torch.long)
            output = model.eval()(input_ids=ids, use_cache=True, logits_to_keep=1)
            past = output.past_key_values
            del output
            cache = trace.live.total() - ids.nbytes
            del past
    parts = Counter({CACHE: cache, PROMPT: trace.peak.total() - cache, "scratch": trace.scratch})
    return Traced(dict(parts), trace.peak_in_heap, trace.most_in_heap, tuple(trace.experts))
