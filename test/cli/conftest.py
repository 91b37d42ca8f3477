"""A tiny model directory, and runs of the command in this process or a separate one, or interrupted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from model_files import save_model

from ktops.checkpoints import new_file, writer
from ktops.cli.finetune import corpus, demo_model, verify
from ktops.cli.finetune import run as finetune


@pytest.fixture(scope="session")
def tokenizer():
    return demo_model.train_tokenizer(corpus.stories(50), vocab_size=400)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory, tokenizer) -> Path:
    """A random Qwen3-MoE model of 2 layers and 8 experts, with a tokenizer that has no chat template."""
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, tokenizer)
    return directory


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    """24 examples in the alpaca layout, one JSON object per line."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    records = corpus.instructions()[0][:24]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def short_samples(monkeypatch, single_thread):
    """Limits answers to a few tokens, because their text is not tested here."""
    monkeypatch.setattr(finetune, "NEW_TOKENS", 4)


@pytest.fixture
def reload_here(monkeypatch):
    """Checks the reloaded adapter in this process, which is faster, for tests of other things."""

    def run(path: Path) -> dict[str, float]:
        return verify.check(verify.Record(**json.loads(path.read_text())))

    monkeypatch.setattr(verify, "run", run)


INTERRUPTED = """
import os, signal, sys
from ktops.cli import main
from ktops.cli.finetune import progress

def on_log(self, args, state, control, show=progress.ProgressCallback.on_log, **kwargs):
    show(self, args, state, control, **kwargs)
    if state.global_step == STEP:
        os.kill(os.getpid(), signal.SIGINT)

progress.ProgressCallback.on_log = on_log
sys.argv[0] = "ktops"
main.main()
"""


@pytest.fixture
def interrupted_command(tmp_path):
    """``run(step, *arguments) -> (exit status, stdout, stderr)`` runs the command in a separate process.

    The process sends itself SIGINT after it has shown that step; a signal from outside could come too late.
    """

    def run(step: int, *arguments: object) -> tuple[int, str, str]:
        command = [sys.executable, "-c", INTERRUPTED.replace("STEP", str(step)), *map(str, arguments)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return result.returncode, result.stdout, result.stderr

    return run


@pytest.fixture
def convert(ktops_command, model_directory):
    def run(*arguments, source=model_directory):
        return ktops_command("convert", source, *arguments)

    return run


@pytest.fixture
def stop_after_a_layer(monkeypatch):
    """Simulates Ctrl-C before the second layer is written; returns a function that stops this.

    The function returns the list of layers written afterward.
    """
    names, make = [], new_file.layer_file
    stopping = True

    def layer_file(path, layer):
        if stopping and names:
            raise KeyboardInterrupt
        names.append(layer.name)
        return make(path, layer)

    def go_on() -> list[str]:
        nonlocal stopping
        stopping = False
        names.clear()
        return names

    monkeypatch.setattr(writer, "layer_file", layer_file)
    return go_on
