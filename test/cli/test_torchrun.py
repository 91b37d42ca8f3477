"""`ktops finetune` as torchrun starts it, and Ctrl-C as torchrun passes it on."""

import json
import subprocess

from ktops.testing.torchrun import torchrun

COMMAND = """
import os, signal, sys
from ktops.cli import main
from ktops.cli.finetune import progress

def on_log(self, args, state, control, show=progress.ProgressCallback.on_log, **kwargs):
    show(self, args, state, control, **kwargs)
    if (state.global_step, args.process_index) == (2, 0):
        os.kill(os.getppid(), signal.SIGINT)  # torchrun

progress.ProgressCallback.on_log = on_log
main.main()
"""


def test_interrupted_and_continued_by_one_process(
    ktops_command, reload_here, model_directory, data_file, tmp_path
):
    (tmp_path / "ktops").write_text(COMMAND)
    options = [
        "--model", model_directory, "--data", data_file, "--max-length", 96, "--lora-rank", 4,
        "--max-steps", 5000, "--save-steps", 5000, "--batch-size", 2, "--output-dir", "out",
    ]  # fmt: skip
    command = torchrun(2, "ktops", "finetune", *options)
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1, result.stderr
    assert result.stdout.count("  2 processes, ") == 1
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 2 < stopped < 5000
    message = (
        f"Stopped after step {stopped} of 5000. To continue:\n  torchrun --standalone --nproc-per-node 2"
    )
    assert result.stderr.count(message) == 1
    resume = ["finetune", "--resume", "--output-dir", "out", "--max-steps", stopped + 1]
    status, out, err = ktops_command(*resume)
    assert (status, err) == (0, "") and f"continuing from out/checkpoints/{checkpoint.name}" in out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [step["step"] for step in metrics["steps"]] == list(range(1, stopped + 2))
