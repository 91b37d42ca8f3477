"""Counts the memory of a step of `ktops finetune`."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer

from ktops.cli.finetune.options import Options
from ktops.cli.finetune.training import training_arguments
from ktops.cli.plan.trace import MemoryTrace, make_fake

ACTIVATIONS = "saved activations"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer state"
ADAPTERS = "adapters"


@dataclass(frozen=True)
class Step:
    parts: dict[str, int]
    experts: list[tuple[int, int]]


def trace_step(model: nn.Module, options: Options, batch_size: int, length: int) -> Step:
    mode = FakeTensorMode()
    make_fake(model, mode)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trace = MemoryTrace(model)
    with mode, trace:
        optimizer = _optimizer(trained, options)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
            trace.set_kind(GRADIENTS, [parameter.grad])
        optimizer.step()
        for state in optimizer.state.values():
            trace.set_kind(OPTIMIZER, [value for value in state.values() if isinstance(value, torch.Tensor)])
        stages = [trace.peak]
        if options.gradient_accumulation_steps == 1:
            optimizer.zero_grad()
        trace.reset_peak()
        _forward_and_backward(model, trained, options, trace, batch_size, length)
        stages.append(trace.peak)
    peak = max(stages, key=Counter.total)
    print(stages)
    return Step({**peak, ADAPTERS: sum(p.nbytes for p in trained), "scratch": trace.scratch}, trace.experts)


def _optimizer(trained: list[nn.Parameter], options: Options) -> torch.optim.Optimizer:
    arguments = training_arguments(options, Path(), max_steps=1, optim=options.optimizer)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(trained, **settings)


def _forward_and_backward(model, trained, options, trace: MemoryTrace, batch_size: int, length: int) -> None:
    hooks = [
        parameter.register_post_accumulate_grad_hook(
            lambda parameter: trace.set_kind(GRADIENTS, [parameter.grad])
        )
        for parameter in trained
    ]
    model.train()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.zeros(batch_size, length, dtype=torch.long)
    with trace.saved_as(ACTIVATIONS):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
