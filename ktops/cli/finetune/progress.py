"""Shows training progress: a bar in a terminal, occasional lines in a file or a pipe."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

LINES = 10
"""Number of lines per training run when the output is not a terminal."""


class ProgressCallback(TrainerCallback):
    """Shows one bar per ``Trainer.train`` with step, loss, tokens per second and time left.

    Args:
        every: steps between lines; None for LINES lines.
    """

    def __init__(self, console: Console, description: str, every: int | None = None):
        self.console, self.every = console, every
        self.trains = False
        self.progress = Progress(
            TextColumn(f"  {description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.description = description

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.progress.add_task(
            "", total=state.max_steps, completed=state.global_step, loss="-", rate="-"
        )
        self.trains = True
        if self.console.is_terminal:
            self.progress.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "eval_loss" in (logs or {}) and self.trains:
            self.console.print(f"  step {state.global_step}: held-out loss {logs['eval_loss']:.3f}")
        if "loss" not in (logs or {}):
            return
        last = state.log_history[-1]
        rate = f"{last['tokens'] / last['seconds']:,.0f}" if last.get("seconds") else "-"
        self.progress.update(self.task, completed=state.global_step, loss=f"{logs['loss']:.3f}", rate=rate)
        every = self.every or max(1, state.max_steps // LINES)
        if not self.console.is_terminal and state.global_step % every == 0:
            self.console.print(
                f"  {self.description} step {state.global_step}/{state.max_steps}  loss {logs['loss']:.3f}  "
                f"{rate} tokens/s"
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.trains = False
        if self.console.is_terminal:
            self.progress.stop()
