"""Measures training while it runs: tokens per second, share of the time inside kt ops, peak memory."""

import resource
import sys
import time

import torch
from transformers import TrainerCallback

from ktops.formats import ExpertWeight


def peak_rss_bytes() -> int:
    """Returns the peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def count_weights(model: torch.nn.Module) -> int:
    """Returns the number of weights of a model, including those in weight formats."""
    quantized = (module.shape.numel() for module in model.modules() if isinstance(module, ExpertWeight))
    return sum(parameter.numel() for parameter in model.parameters()) + sum(quantized)


class StepTimer(TrainerCallback):
    """Adds ``seconds`` (one optimizer step, without evaluation and saving) and ``tokens`` (without padding)
    to every entry of the log. Needs ``include_num_input_tokens_seen="non_padding"`` and logging at each
    step."""

    def __init__(self):
        self.seconds = 0.0
        self.tokens = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self._start, self._seen = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        self._step = time.perf_counter() - self._start
        self._new_tokens = int(state.num_input_tokens_seen - self._seen)
        self.seconds += self._step
        self.tokens += self._new_tokens

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            state.log_history[-1].update(seconds=round(self._step, 4), tokens=self._new_tokens)


class _TimedOp:
    """Wraps an operator and adds up the time spent in its calls.

    For tensors on an accelerator, a call runs the same operator on copies; that is not another call.
    """

    def __init__(self, op):
        self.op, self.calls, self.seconds = op, 0, 0.0
        self.running = False

    def __call__(self, *args, **kwargs):
        if self.running:
            return self.op(*args, **kwargs)
        self.running, start = True, time.perf_counter()
        try:
            return self.op(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start
            self.calls += 1
            self.running = False

    def __getattr__(self, name):
        return getattr(self.op, name)


class KtTime(TrainerCallback):
    """Adds up the time inside the operators of the kt namespace during training.

    During training, wrappers that read the clock before and after each call replace
    ``torch.ops.kt.moe_sft_fwd`` and the others. Unlike profiling, this costs almost nothing, so every step is
    measured. The time includes the dispatcher and autograd's bookkeeping, but not the Python code of PEFT and
    transformers around the op.
    """

    NAMES = ("moe_sft_fwd", "moe_sft_bwd", "moe_fwd")

    def on_train_begin(self, args, state, control, **kwargs):
        self.ops = {name: _TimedOp(getattr(torch.ops.kt, name)) for name in self.NAMES}
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
