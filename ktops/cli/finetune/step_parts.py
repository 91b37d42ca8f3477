"""Divides the time of every training step among the parts of a model, by hooks that read a clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ktops.cli.finetune.lora import ATTENTION
from ktops.integrations.chunked_loss import ChunkedLoss
from ktops.integrations.transformers.experts import layout_in_op

PARTS = ("experts", "attention", "other matrices", "loss", "optimizer", "data", "rest")
"""``experts``: kt ops, or what runs instead. ``other matrices``: linear layers outside attention.
``loss``: with the head. ``optimizer``: with the clipping of gradients."""


class Clock:
    """Assigns each moment of a step to one part. It stands still between steps."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._part: str | None = None
        self._since = 0.0

    @property
    def is_running(self) -> bool:
        """Whether a step is under way."""
        return self._part is not None

    def start(self, part: str) -> None:
        """Begins a step, with a part."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = part, time.perf_counter()

    def stop(self) -> dict[str, float]:
        """Ends a step; returns the seconds of each part."""
        self.switch("rest")
        self._part = None
        return self._seconds

    def switch(self, part: str) -> str:
        """Assigns the time from now on to a part; returns the part so far. Does nothing between steps."""
        if self._part is None:
            return part
        now, previous = time.perf_counter(), self._part
        self._seconds[previous] += now - self._since
        self._part, self._since = part, now
        return previous

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        previous = self.switch(part)
        try:
            yield
        finally:
            self.switch(previous)


class Watch:
    """Hooks that tell a clock which part of a model runs, forward and backward, until ``remove``.

    In forward, a module's part runs from its first hook to its last. In backward, it runs from the gradient
    of the module's output to that of its input, which is a view, so that its gradient is complete before
    that of other modules with the same input is.
    """

    def __init__(self, model: nn.Module, clock: Clock):
        self.clock = clock
        self._hooks: list[RemovableHandle] = []
        get_base_model = getattr(model, "get_base_model", None)
        self._model: Any = model if get_base_model is None else get_base_model()
        self._loss: Any = self._model.loss_function
        for module, part in _parts(self._model, isinstance(self._loss, ChunkedLoss)):
            self._watch(module, part)
        self._model.loss_function = self._timed_loss

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._model.loss_function = self._loss

    def _timed_loss(self, *args, **kwargs) -> Tensor:
        with self.clock.during("loss"):
            loss = self._loss(*args, **kwargs)
        if not isinstance(self._loss, ChunkedLoss):  # which has computed its gradients
            self._on_gradient(loss, "loss")
        return loss

    def _watch(self, module: nn.Module, part: str) -> None:
        before: list[str] = []

        def begin(module, args, kwargs):
            before.append(self.clock.switch(part))
            if args and isinstance(args[0], Tensor):
                return (self._view(args[0]), *args[1:]), kwargs
            if isinstance(hidden_states := kwargs.get("hidden_states"), Tensor):
                return args, {**kwargs, "hidden_states": self._view(hidden_states)}
            return None

        def end(module, args, output):
            self.clock.switch(before.pop())
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):  # None if checkpointing has stopped early
                self._on_gradient(first, part)

        self._hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(end, always_call=True))

    def _view(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        view = tensor.view_as(tensor)
        self._on_gradient(view, "rest")
        return view

    def _on_gradient(self, tensor: Tensor, part: str) -> None:
        def switch(gradient: Tensor) -> None:
            self.clock.switch(part)

        if tensor.requires_grad:
            tensor.register_hook(switch)


def _parts(model: Any, chunked: bool) -> Iterator[tuple[nn.Module, str]]:
    """Yields modules, none inside another, and the part that each is. A chunked loss includes the head."""
    head = model.get_output_embeddings()

    def visit(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        for child in module.children():
            if child is head:
                if not chunked:
                    yield child, "loss"
            elif any(name in ATTENTION for name, _ in child.named_children()):
                yield child, "attention"
            elif isinstance(getattr(child, "base_layer", child), nn.Linear):
                yield child, "other matrices"
            elif _is_stack(child) and layout_in_op(child) is None:
                yield child, "experts"
            else:
                yield from visit(child)

    return visit(model)


def _is_stack(module: nn.Module) -> bool:
    weight = module._parameters.get("down_proj")
    return weight is not None and weight.dim() == 3
