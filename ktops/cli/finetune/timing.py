"""Measures training while it runs: tokens per second, and the parts of the model in which time passes."""

import time
from collections import Counter
from typing import Any

import torch
from transformers import TrainerCallback

from ktops.cli import processes
from ktops.cli.finetune.encoding import IGNORED
from ktops.cli.finetune.step_parts import PARTS, Clock, Watch


class StepTimer(TrainerCallback):
    """Measures steps: their batches, the model and the optimizer, without evaluation, logging and saving.

    Adds to every entry of the log ``seconds``, ``tokens`` (without padding), ``padding`` (tokens of padding)
    and ``parts``, the seconds of each of PARTS. Tokens are those of all processes, seconds those of this one.
    Needs logging at each step, and a trainer that calls :meth:`begin` and :meth:`collected`.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.seconds, self.tokens, self.padding = 0.0, 0, 0
        self.parts: Counter[str] = Counter()
        self._watch: Watch | None = None

    def begin(self) -> None:
        """A step begins; its batches are collected."""
        self.clock.start("data")

    def collected(self, batches: list[dict[str, Any]]) -> None:
        """The batches of the step are there. Those without labels only keep processes in step."""
        batches = [batch for batch in batches if (batch["labels"] != IGNORED).any()]
        total = sum(batch["input_ids"].numel() for batch in batches)
        masks = [batch.get("attention_mask") for batch in batches]
        self._padding = sum(int((mask == 0).sum()) for mask in masks if mask is not None)
        self._tokens = total - self._padding
        self.clock.switch("rest")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self._watch = Watch(model, self.clock)

    def on_train_end(self, args, state, control, **kwargs):
        if self._watch is not None:
            self._watch.remove()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.clock.switch("optimizer")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.clock.switch("rest")

    def on_step_end(self, args, state, control, **kwargs):
        tokens, padding = processes.all_reduce_sum(self._tokens, self._padding)
        parts = self.clock.stop()
        seconds = sum(parts.values())
        self.parts.update(parts)
        self.seconds += seconds
        self.tokens += tokens
        self.padding += padding
        self._entry = {
            "seconds": round(seconds, 4),
            "tokens": tokens,
            "padding": padding,
            "parts": {part: round(value, 4) for part, value in parts.items()},
        }

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            state.log_history[-1].update(self._entry)

    def summary(self) -> dict[str, Any]:
        """Returns tokens and padding per second, and the ``step_time``: seconds and share of each part."""
        if not self.seconds:
            return {"tokens_per_second": None, "padding_per_second": None, "step_time": None}
        return {
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "padding_per_second": round(self.padding / self.seconds, 1),
            "step_time": {
                part: {
                    "seconds": round(self.parts[part], 4),
                    "share": round(self.parts[part] / self.seconds, 4),
                }
                for part in PARTS
            },
        }


class _TimedOp:
    """Wraps an operator and adds up the time spent in its calls during steps.

    For tensors on an accelerator, a call runs the same operator on copies; that is not another call.
    """

    def __init__(self, op, clock: Clock):
        self.op, self.clock, self.calls, self.seconds = op, clock, 0, 0.0
        self.running = False

    def __call__(self, *args, **kwargs):
        if self.running or not self.clock.is_running:
            return self.op(*args, **kwargs)
        self.running, start = True, time.perf_counter()
        try:
            with self.clock.during("experts"):
                return self.op(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start
            self.calls += 1
            self.running = False

    def __getattr__(self, name):
        return getattr(self.op, name)


class KtTime(TrainerCallback):
    """Adds up the time inside the operators of the kt namespace during steps of training, not evaluation.

    During training, wrappers that read the clock before and after each call replace
    ``torch.ops.kt.moe_sft_fwd`` and the others. Unlike profiling, this costs almost nothing, so every step is
    measured. The time includes the dispatcher and autograd's bookkeeping, but not the Python code of PEFT and
    transformers around the op.
    """

    NAMES = ("moe_sft_fwd", "moe_sft_bwd", "moe_fwd")

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_begin(self, args, state, control, **kwargs):
        self.ops = {name: _TimedOp(getattr(torch.ops.kt, name), self.clock) for name in self.NAMES}
        for name, op in self.ops.items():
            setattr(torch.ops.kt, name, op)

    def on_train_end(self, args, state, control, **kwargs):
        for name, op in self.ops.items():
            setattr(torch.ops.kt, name, op.op)

    def summary(self, seconds: float) -> dict | None:
        """Returns the ``share`` of ``seconds`` inside kt ops, and each op's calls and seconds.

        Returns None if ``seconds`` is 0.
        """
        if not seconds:
            return None
        ops = {name: {"calls": op.calls, "seconds": round(op.seconds, 4)} for name, op in self.ops.items()}
        return {"share": round(sum(op.seconds for op in self.ops.values()) / seconds, 4), "ops": ops}
