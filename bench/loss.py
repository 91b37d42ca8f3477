"""Compares the loss over a vocabulary, head included, in chunks of tokens with that from the logits of all.

    python -m bench.loss
    python -m bench.loss --tokens 512 2048 --labels 0.5

Forward and backward with a frozen head in bfloat16, for hidden states that need a gradient. "all logits" is
what transformers does: cross_entropy of the logits in float32. "torch" is linear_cross_entropy of PyTorch
2.13 with its options. CPU seconds of all threads, the best of several calls in turn; "of the products" is
the share of them that the two products alone take, in one call each. MiB: the highest resident memory, beyond
inputs and results.

--labels is the share of the tokens that have a label; the chunks leave the others out.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from bench.arguments import Parser
from bench.machine import cpu_model
from bench.memory import MIB, reset_peak, resident_bytes
from ktops.integrations.cross_entropy import chunked_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def all_logits(hidden_states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Returns the sum of the cross entropies, as transformers computes it."""
    logits = functional.linear(hidden_states, head).float()
    return functional.cross_entropy(logits, targets, reduction="sum")


def in_chunks(hidden_states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Returns the same, of the tokens with a label."""
    rows = (targets != -100).nonzero()[:, 0]
    return chunked_cross_entropy(
        lambda chunk: functional.linear(chunk, head), hidden_states[rows], targets[rows], len(head)
    )


def by_torch(hidden_states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Returns the same by PyTorch, in the dtype of the hidden states."""
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(hidden_states, head, targets, reduction="sum", options=options)


def measure(loss: Loss, hidden_states: Tensor, head: Tensor, targets: Tensor) -> tuple[float, float, Tensor]:
    """Returns CPU seconds and MiB of a forward and backward, and the gradient of the hidden states."""
    leaf = hidden_states.clone().requires_grad_()
    reset_peak()
    before, start = resident_bytes(), time.process_time()
    loss(leaf, head, targets).backward()
    seconds = time.process_time() - start
    assert leaf.grad is not None
    return seconds, (resident_bytes(peak=True) - before) / MIB, leaf.grad


def products(hidden_states: Tensor, head: Tensor) -> float:
    """Returns the CPU seconds of the two products of all tokens."""
    start = time.process_time()
    functional.linear(hidden_states, head) @ head
    return time.process_time() - start


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("loss", __doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--labels", type=float, default=1.0)
    parser.add_argument("--vocab-size", type=int, default=102_400)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--torch", action="store_true", help="also linear_cross_entropy of PyTorch 2.13")
    args = parser.parse_args(arguments)
    losses: dict[str, Loss] = {"all logits": all_logits, "in chunks": in_chunks}
    if args.torch:
        losses["torch"] = by_torch
    print(f"{cpu_model()}, {torch.get_num_threads()} threads, vocabulary {args.vocab_size:,}")
    print(f"{'tokens':>6}  {'loss':12}{'CPU s':>8}{'of the products':>17}{'ratio':>7}{'MiB':>8}{'error':>10}")
    torch.manual_seed(0)
    head = (torch.randn(args.vocab_size, args.hidden_size) * args.hidden_size**-0.5).bfloat16()
    for tokens in args.tokens:
        hidden_states = torch.randn(tokens, args.hidden_size).bfloat16()
        targets = torch.randint(args.vocab_size, (tokens,))
        targets[torch.arange(tokens) >= args.labels * tokens] = -100
        runs: dict[str, list] = {name: [] for name in losses}
        alone = []
        for _ in range(args.repeats):
            alone.append(products(hidden_states, head))
            for name, loss in losses.items():
                runs[name].append(measure(loss, hidden_states, head, targets))
        base = min(run[0] for run in runs["all logits"])
        exact = runs["all logits"][0][2].float()
        for name, found in runs.items():
            seconds, mib = min(run[0] for run in found), max(run[1] for run in found)
            error = float((found[0][2].float() - exact).norm() / exact.norm())
            print(
                f"{tokens:6}  {name:12}{seconds:8.2f}{min(alone) / seconds:17.0%}{seconds / base:7.2f}"
                f"{mib:8.0f}{error:10.1e}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
