"""Compares transformers' "sdpa" (with sinks, "eager") with ktops' attention: forward and backward of a layer.

    python -m bench.attention
    python -m bench.attention --tokens 2048 --packed 4

cpu: CPU seconds of a forward and backward, the median of calls that alternate with the other implementation.
peak: the highest resident memory during a call, beyond inputs and before it, in MiB. bfloat16, one row of
causal attention, or of --packed sequences of equal length.
"""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import ktops
from bench.arguments import Parser, positive
from bench.machine import cpu_model
from bench.memory import MIB, reset_peak, resident_bytes


@dataclass(frozen=True)
class Attention:
    """Sizes of the attention of a model."""

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    has_sinks: bool = False
    window: int | None = None


ATTENTIONS = {
    "deepseek-v2-lite": Attention(16, 16, 192, 128),
    "qwen3-30b-a3b": Attention(32, 4, 128, 128),
    "gpt-oss-20b": Attention(64, 8, 64, 64, has_sinks=True),
    "gpt-oss-20b window": Attention(64, 8, 64, 64, has_sinks=True, window=128),
}


class Layer:
    """Random inputs of an attention, and the arguments with which a model of transformers calls it."""

    def __init__(self, attention: Attention, tokens: int, packed: int):
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.bfloat16)

        a = attention
        self.inputs = [random(1, a.heads, tokens, a.key_dim), random(1, a.key_heads, tokens, a.key_dim)]
        self.inputs.append(random(1, a.key_heads, tokens, a.value_dim))
        self.sinks = random(a.heads) if a.has_sinks else None
        self.grad = random(1, tokens, a.heads, a.value_dim)
        starts = torch.arange(packed + 1) * tokens // packed
        self.starts = starts if packed > 1 else None
        self.mask = None
        self.module: Any = SimpleNamespace(
            num_key_value_groups=a.heads // a.key_heads, is_causal=True, training=True, sinks=self.sinks
        )
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        owners = torch.bucketize(torch.arange(tokens), starts[1:], right=True)
        seen &= owners[:, None] == owners
        self.whole = seen if a.window is None else seen.triu(1 - a.window)
        if a.window is not None:
            self.mask = self.whole[None, None]

    def run(self, forward: Callable[..., Tensor]) -> None:
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        forward(*leaves).backward(self.grad)

    def transformers(self, *inputs: Tensor) -> Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

        scaling = inputs[0].shape[-1] ** -0.5
        plain = self.mask is None and self.starts is None
        if self.sinks is None:
            mask = None if plain else self.whole[None, None]
            return sdpa_attention_forward(self.module, *inputs, mask, scaling=scaling)[0]
        mask = torch.zeros(self.whole.shape, dtype=torch.bfloat16)
        mask.masked_fill_(~self.whole, torch.finfo(mask.dtype).min)
        return eager_attention_forward(self.module, *inputs, mask[None, None], scaling)[0]

    def ktops(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from ktops.integrations.transformers.attention import attention_forward

        return attention_forward(
            self.module, query, key, value, self.mask, s_aux=self.sinks, cu_seq_lens_q=self.starts
        )[0]


def cpu_seconds(layer: Layer, rounds: int) -> tuple[float, float]:
    """Returns the median CPU seconds of (transformers, ktops), which take turns."""
    seconds: dict[str, list[float]] = {"transformers": [], "ktops": []}
    for _ in range(rounds + 1):
        for name, times in seconds.items():
            start = time.process_time()
            layer.run(getattr(layer, name))
            times.append(time.process_time() - start)
    before, after = (statistics.median(times[1:]) for times in seconds.values())
    return before, after


def peak_bytes(layer: Layer, name: str) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    before = resident_bytes()
    layer.run(getattr(layer, name))
    return resident_bytes(peak=True) - before


def main(argv: list[str] | None = None) -> int:
    parser = Parser("attention", __doc__)
    parser.add_argument("--tokens", type=positive, nargs="+", default=[512, 2048])
    parser.add_argument("--attention", nargs="+", choices=list(ATTENTIONS), default=list(ATTENTIONS))
    parser.add_argument("--packed", type=positive, default=1, metavar="N", help="sequences in the row")
    parser.add_argument("--rounds", type=positive, default=3)
    args = parser.parse_args(argv)
    ktops.enable()
    print(f"{cpu_model()}, {torch.get_num_threads()} threads, bfloat16, {args.packed} sequences")
    print(f"{'attention':20} {'tokens':>6} {'transformers':>20} {'ktops':>20} {'cpu ratio':>9}")
    for name in args.attention:
        for tokens in args.tokens:
            layer = Layer(ATTENTIONS[name], tokens, args.packed)
            peaks = [peak_bytes(layer, which) / MIB for which in ("transformers", "ktops")]
            before, after = cpu_seconds(layer, args.rounds)
            print(
                f"{name:20} {tokens:6} {before:8.3f} s {peaks[0]:5.0f} MiB {after:8.3f} s {peaks[1]:5.0f} MiB"
                f" {after / before:9.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
