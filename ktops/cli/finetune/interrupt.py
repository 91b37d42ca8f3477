"""Handles Ctrl-C during training: finishes the step, saves a checkpoint, stops."""

import signal

from transformers import TrainerCallback

from ktops.cli import processes


class StopOnInterrupt(TrainerCallback):
    """The first SIGINT ends training after the current step and a checkpoint; the second ends the process at
    once. Of several processes, all stop after the same step."""

    def __init__(self, notice):
        self.notice = notice
        self.stopped = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._previous = signal.signal(signal.SIGINT, self._request)

    def _request(self, signum, frame):
        self.stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.notice()

    def on_step_end(self, args, state, control, **kwargs):
        self.stopped = any(processes.all_reduce_sum(int(self.stopped)))
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self._previous)
