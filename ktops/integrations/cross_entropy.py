"""Cross entropy in chunks of tokens. Forward computes the gradients too, so no logits need to be kept."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

LOGITS_PER_CHUNK = 40_000_000
"""76 MiB in bfloat16: 256 tokens with a vocabulary of up to 156,250, enough for full speed."""

TOKENS_PER_BLOCK = 256
"""Chunks are multiples of it where they are that large: oneDNN's products of 293 tokens are 13 % slower."""

LOGITS_PER_SOFTMAX = 1 << 22
"""Logits in float32 at a time on the CPU, 16 MiB: near its caches, but not so few that threads wait."""

LogitsOf = Callable[[Tensor], Tensor]


def chunked_cross_entropy(
    logits_of: LogitsOf,
    hidden_states: Tensor,
    targets: Tensor,
    vocab_size: int,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """Returns the sum of the cross entropies of tokens, a scalar in float32.

    As in ``torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")``, the softmax is
    computed in float32 and its gradient rounded to the dtype of the logits.

    Args:
        logits_of: maps hidden states [n, H] to logits [n, V] or [1, n, V]. It has a graph of its own for each
            chunk, whose result is overwritten with its gradient. If that is a view, autograd copies it.
        hidden_states: [N, H].
        targets: token ids [N], int64, in [0, V).
        vocab_size: V.
        parameters: those of ``logits_of`` that may need gradients.

    Example:
        >>> chunked_cross_entropy(lm_head, hidden_states, targets, vocab_size).backward()
    """
    return _ChunkedCrossEntropy.apply(logits_of, targets, vocab_size, hidden_states, *parameters)


@torch.no_grad()
def evaluate_cross_entropy(
    logits_of: LogitsOf, hidden_states: Tensor, targets: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Returns what :func:`chunked_cross_entropy` does, without gradients, and the most probable ids [N]."""
    total = hidden_states.new_zeros((), dtype=torch.float32)
    guesses = torch.empty_like(targets)
    for rows in _chunks(len(targets), vocab_size):
        logits = logits_of(hidden_states[rows]).flatten(0, -2)
        guesses[rows] = logits.argmax(-1)
        total += _replace_by_gradient(logits, targets[rows])
    return total, guesses


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_of: LogitsOf, targets: Tensor, vocab_size: int, *inputs: Tensor):
        hidden_states, *parameters = inputs
        needs_hidden, *needs = ctx.needs_input_grad[3:]
        trained = [p for p, needed in zip(parameters, needs, strict=True) if needed]
        total = hidden_states.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_states)
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        for rows in _chunks(len(targets), vocab_size):
            chunk = hidden_states[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = logits_of(chunk)
            total += _replace_by_gradient(logits.detach().flatten(0, -2), targets[rows])
            grad_hidden[rows], *found = torch.autograd.grad(
                logits, (chunk, *trained), logits.detach(), allow_unused=True
            )
            for grad, part in zip(sums, found, strict=True):
                if part is not None:
                    grad += part
            del logits  # before the next chunk has its own
        rounded = iter([grad.to(p.dtype) for grad, p in zip(sums, trained, strict=True)])
        ctx.grads = [grad_hidden if needs_hidden else None]
        ctx.grads += [next(rounded) if needed else None for needed in needs]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total: Tensor):
        grads = (None if grad is None else grad * grad_total for grad in ctx.grads)
        return None, None, None, *grads


def _chunks(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    """Divides tokens into chunks of equal size, up to one, in blocks of TOKENS_PER_BLOCK if those fit."""
    most = max(1, LOGITS_PER_CHUNK // vocab_size)
    block = TOKENS_PER_BLOCK if most >= TOKENS_PER_BLOCK else 1
    number = max(1, math.ceil(num_tokens / (most - most % block)))
    size = math.ceil(num_tokens / number / block) * block
    return (slice(start, start + size) for start in range(0, num_tokens, max(1, size)))


def _replace_by_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Overwrites logits [n, V] with the gradient of the sum of their cross entropies, and returns the sum."""
    vocab_size = logits.shape[-1]
    rows = len(logits) if logits.device.type != "cpu" else max(1, LOGITS_PER_SOFTMAX // vocab_size)
    memory = logits.new_empty((min(rows, len(logits)), vocab_size), dtype=torch.float32)
    total = logits.new_zeros((), dtype=torch.float32)
    for part, ids in zip(logits.split(rows), targets[:, None].split(rows), strict=True):
        exact = memory[: len(part)].copy_(part)
        exact -= exact.amax(-1, keepdim=True)
        of_targets = exact.gather(1, ids)
        sums = exact.exp_().sum(-1, keepdim=True)
        total += (sums.log() - of_targets).sum()
        exact /= sums
        part.copy_(exact.scatter_add_(1, ids, exact.new_full(ids.shape, -1.0)))
    return total
