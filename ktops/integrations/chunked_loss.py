"""The loss of a causal language model in chunks of tokens, so that the logits of all tokens never exist."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ktops._warn import warn_once
from ktops.integrations.cross_entropy import chunked_cross_entropy, evaluate_cross_entropy

_PROBE_TOKENS = 8


def chunk_loss(model: nn.Module) -> "ChunkedLoss":
    """Makes a causal language model compute its loss, and the gradients of it, in chunks of tokens.

    The head of the model runs only on tokens that have a label, a few hundred at a time. The forward of a
    chunk also computes its gradients, one product each way, and drops its logits. Everything that the model
    does between head and loss, and what it adds to the loss, such as that of its routers, stays in effect.

    When it is given ``labels``, the model returns ``logits`` of no tokens, [B, 0, V]. Without ``labels``, or
    with ``logits_to_keep``, it is unchanged.

    A few tokens are tried first. If the loss would be another one, or the model does not use the
    ``loss_function`` and ``logits_to_keep`` of transformers, a warning says why, and the model keeps its own
    loss.

    Args:
        model: a causal language model of transformers, with or without PEFT adapters.

    Returns:
        A handle. ``reason`` says why the model keeps its own loss; ``remove()`` restores that.

    Example:
        >>> ktops.chunk_loss(model)
        >>> Trainer(model, ...).train()
    """
    loss = ChunkedLoss(model)
    if isinstance(getattr(loss.model, "loss_function", None), ChunkedLoss):
        return loss.model.loss_function
    loss.reason = loss.install()
    if loss.reason is not None:
        warn_once(
            f"ktops: {type(loss.model).__name__} computes its loss from the logits of all tokens, because "
            f"{loss.reason}. Long sequences need much memory"
        )
    return loss


class ChunkedLoss:
    """The loss of a model that :func:`chunk_loss` has changed.

    Attributes:
        reason: why the model keeps its own loss, or None.
        predictions: after a forward without gradients, the most probable next token [B, T] of each token with
            a label, and 0 elsewhere.
    """

    reason: str | None = None
    predictions: Tensor | None = None

    def __init__(self, model: nn.Module):
        get_base_model = getattr(model, "get_base_model", None)
        self.model: Any = model if get_base_model is None else get_base_model()
        self.backbone = _backbone(self.model)
        self._own: Any = getattr(self.model, "loss_function", None)
        self._output: Any = None
        self._expected = False
        self._hooks: list[RemovableHandle] = []

    def install(self) -> str | None:
        """Takes the place of the model's own loss; returns the reason if it cannot."""
        from transformers.loss.loss_utils import ForCausalLMLoss

        if self.backbone is self.model:
            return "ktops does not find its layers"
        if self._own is not ForCausalLMLoss:
            return f"its loss is {getattr(self._own, '__name__', self._own)}"
        tokens = torch.arange(1, 1 + _PROBE_TOKENS, device=self.model.get_input_embeddings().weight.device)
        inputs = {"input_ids": tokens[None], "labels": tokens[None].masked_fill(tokens < 3, -100)}
        own = self._probe(inputs)
        self.replace()
        try:
            reason = _disagreement(self._probe(inputs), own)
        except Exception as error:
            reason = f"that fails with {type(error).__name__}: {error}"
        if reason is not None:
            self.remove()
        return reason

    def replace(self) -> None:
        """Takes the place of the model's own loss, untried."""
        self.model.loss_function = self
        self._hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.backbone.register_forward_hook(self._capture),
        ]

    def remove(self) -> None:
        """Gives the model its own loss back."""
        for hook in self._hooks:
            hook.remove()
        self.model.loss_function = self._own

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict):
        self._output = None
        given = kwargs.get("logits_to_keep")
        self._expected = kwargs.get("labels") is not None and (isinstance(given, int | None) and not given)
        if not self._expected:
            return None
        nothing = torch.empty(0, dtype=torch.long, device=kwargs["labels"].device)
        return args, {**kwargs, "logits_to_keep": nothing}

    def _capture(self, module: nn.Module, args: tuple, output) -> None:
        if self._expected:
            self._output = output

    @torch.compiler.disable  # it runs the model's own forward with another backbone
    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Takes the place of ``ForCausalLMLoss``, with its arguments."""
        output, self._output, self._expected = self._output, None, False
        if output is None:
            return self._own(
                logits,
                labels,
                vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **kwargs,
            )
        logits_of = functools.partial(self._logits, output)
        hidden_states = output[0]
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(hidden_states.device)
        rows = (targets != ignore_index).nonzero()[:, 0]
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])[rows]
        if torch.is_grad_enabled():
            loss = chunked_cross_entropy(
                logits_of, hidden_states, targets[rows], vocab_size, self._trainable()
            )
        else:
            loss, guesses = evaluate_cross_entropy(logits_of, hidden_states, targets[rows], vocab_size)
            self.predictions = torch.zeros_like(targets).index_copy_(0, rows, guesses).view(labels.shape)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        if num_items_in_batch is None and not len(rows):
            return loss + torch.nan  # the mean of nothing; its gradients are zeros, as in PyTorch
        return loss / (len(rows) if num_items_in_batch is None else num_items_in_batch)

    def _trainable(self) -> list[nn.Parameter]:
        """Returns what is trained between the backbone and the loss: of a head, or its adapter."""
        outside = (module for module in self.model.children() if module is not self.backbone)
        return [p for module in outside for p in module.parameters() if p.requires_grad]

    def _logits(self, output, hidden_states: Tensor) -> Tensor:
        """Returns logits [1, N, V]: the model's own forward after a backbone with that output."""
        hidden_states = hidden_states[None]
        with _returning(self.backbone, _with_hidden_states(output, hidden_states)):
            return self.model.forward(inputs_embeds=hidden_states, use_cache=False).logits

    @torch.no_grad()
    def _probe(self, inputs: dict[str, Tensor]):
        """Runs the model such that a dropout drops the same elements in every call."""
        devices = {p.device.index for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            return self.model(**inputs, use_cache=False)


def _disagreement(chunked, own) -> str | None:
    """Returns in what an output with a chunked loss differs from that of the model, None if in nothing."""
    if chunked.logits.shape[-2]:
        return "it ignores logits_to_keep"
    # A product with fewer rows may round a logit differently, which moves the loss by no more than that.
    allowed = 2 * torch.finfo(own.logits.dtype).eps * float(own.logits.abs().max())
    if float((chunked.loss - own.loss).abs()) <= allowed + 1e-5 * float(own.loss.abs()):
        return None
    return f"in chunks, it would be {float(chunked.loss):.6g} instead of {float(own.loss):.6g}"


def _backbone(model: nn.Module) -> nn.Module:
    """Returns what a model runs before its head; the model itself if that is not known."""
    backbone = getattr(model, "base_model", model)
    return getattr(model, "model", model) if backbone is model else backbone  # the second for Llama-4


def _with_hidden_states(output, hidden_states: Tensor):
    """Returns an output of a backbone with other hidden states, and without what belongs to other tokens."""
    if isinstance(output, tuple):
        return (hidden_states,)
    return type(output)(last_hidden_state=hidden_states)


@contextmanager
def _returning(module: nn.Module, output) -> Iterator[None]:
    """Makes a module return that, whatever it is called with."""
    previous = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if previous is not None:
            module.forward = previous
