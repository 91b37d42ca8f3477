"""Counts the memory of a step of `ktops finetune`."""

from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import Trainer, masking_utils

from ktops.cli.finetune import lora
from ktops.cli.finetune.options import Options
from ktops.cli.finetune.report import Report
from ktops.cli.finetune.training import CHECKPOINTING, training_arguments
from ktops.cli.plan.trace import MemoryTrace, Traced, fake
from ktops.integrations.chunked_loss import ChunkedLoss
from ktops.integrations.lora_linear import adapters_in_input_dtype
from ktops.integrations.replacements import Replacements

ADAPTERS = "adapters"
OPTIMIZER = "optimizer state"
GRADIENTS = "gradients"


def trace_training(model: nn.Module, options: Options, batch_size: int, length: int) -> Traced:
    """Counts the memory of a training step with full sequences, after the first step.

    Without packing, one of them is taken to be padded, so that attention needs masks.

    Args:
        model: from weights.build; gets adapters, and is of no use afterward.
        options: of the run.
        batch_size, length: sequences of a batch, and tokens of each.
    """
    with torch.device("meta"):
        model = lora.add_adapters(model, options, Report(Console(quiet=True)))
    with fake(model):
        trace = MemoryTrace(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with trace:
            optimizer = _optimizer_step(trained, options, trace)
            stages = [(trace.peak, trace.peak_in_heap)]
            # Several processes exchange gradients in memory that they keep.
            if options.gradient_accumulation_steps == options.world_size == 1:
                optimizer.zero_grad()
            trace.reset_peak()
            _forward_and_backward(model, trained, options, trace, (batch_size, length))
            stages.append((trace.peak, trace.peak_in_heap))
    peak, in_heap = max(stages, key=lambda stage: stage[0].total())
    parts = Counter(peak) + Counter({ADAPTERS: sum(p.nbytes for p in trained), "scratch": trace.scratch})
    return Traced(dict(parts), in_heap, trace.most_in_heap, tuple(trace.experts))


def _optimizer_step(trained: list[nn.Parameter], options: Options, trace: MemoryTrace):
    """Runs the first step of the optimizer, which creates its state; the gradients are kept."""
    arguments = training_arguments(options, Path(), max_steps=1, optim=options.optimizer)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind(trained, **settings)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
        trace.set_kind(GRADIENTS, [parameter.grad])
    optimizer.step()
    for state in optimizer.state.values():
        trace.set_kind(OPTIMIZER, [value for value in state.values() if isinstance(value, torch.Tensor)])
    return optimizer


def _forward_and_backward(
    model, trained: list[nn.Parameter], options: Options, trace: MemoryTrace, shape: tuple[int, int]
) -> None:
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: trace.set_kind(GRADIENTS, [p.grad]))
    model.train()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(CHECKPOINTING)
        model.enable_input_require_grads()
    ids = torch.zeros(shape, dtype=torch.long)
    positions = torch.arange(shape[1]).expand(shape)
    mask = None if options.packing else torch.ones(shape, dtype=torch.long)
    ChunkedLoss(model).replace()
    with adapters_in_input_dtype(model):
        with Replacements() as replaced, trace.saved():
            # which would take positions without values for those of sequences that need a mask
            replaced.install(masking_utils, find_packed_sequence_indices=lambda *args, **kwargs: None)
            loss = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, labels=ids, use_cache=False
            ).loss
        loss.backward()
