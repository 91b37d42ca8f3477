"""TRL's scripts and commands through ktops."""

import re
import sys
from pathlib import Path

import pytest
from compare import (
    assert_loads_without_ktops,
    assert_same_training,
    assert_same_updates,
    example,
    run,
    train_both,
    words,
)
from tiny import messages, save_model, save_records

TRAINING = {
    "bf16": False,
    "learning_rate": 0.5,
    "logging_steps": 1,
    "max_steps": 3,
    "optim": "sgd",
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "save_steps": 1,
}

MODEL = "Qwen/Qwen3-30B-A3B"


def conversation(question: str, answer: str, worse: str) -> dict:
    return {"messages": messages(question, answer)}


def preference(question: str, answer: str, worse: str) -> dict:
    prompt, chosen = messages(question, answer)
    return {"prompt": [prompt], "chosen": [chosen], "rejected": [messages(question, worse)[1]]}


def prompt(question: str, answer: str, worse: str) -> dict:
    return {"prompt": messages(question, answer)[:1]}


LAYOUTS = {"SFT": conversation, "DPO": preference, "GRPO": prompt}


def train_by_script(method: str, folder: Path, replacements: dict[str, str], **options) -> tuple[Path, Path]:
    """Trains by the documented script, with a method's trainer and config, and by its plain version."""
    arguments = "".join(f", {name}={value!r}" for name, value in {**TRAINING, **options}.items())
    names = {"SFT": method, 'output_dir="out"': f'output_dir="out"{arguments}', **replacements}
    data = save_records(folder / "train.jsonl", LAYOUTS[method])
    script = example("trl", {**names, "train.jsonl": str(data)})
    plain = re.sub(r'^(import ktops|ktops\.).*\n|"experts_implementation": "ktops"', "", script, flags=re.M)
    assert "ktops" not in plain.replace(str(folder), "")
    files = folder / "with_ktops.py", folder / "plain.py"
    for file, text in zip(files, (script, plain), strict=True):
        file.write_text(text)
    return train_both(*([sys.executable, str(file)] for file in files), folder)


def command(method: str, model: Path, folder: Path, *options: str) -> list[str]:
    """Returns the documented command with other names and options."""
    (folder / "data").mkdir()
    save_records(folder / "data" / "train.jsonl", LAYOUTS[method.upper()])
    names = {MODEL: str(model), "my-dataset": str(folder / "data"), "trl sft": f"trl {method}"}
    training = [part for name, value in TRAINING.items() for part in (f"--{name}", str(value))]
    return [*words(example("trl-command", names)), "--dtype", "float32", *training, *options]


@pytest.mark.ci
def test_script(model, tmp_path):
    ktops, plain = train_by_script("SFT", tmp_path, {MODEL: str(model)})
    assert_same_training(ktops / "out", plain / "out")
    assert_loads_without_ktops(model, ktops / "out", tmp_path / "peft")


def test_dpo_script(model, tmp_path):
    ktops, plain = train_by_script("DPO", tmp_path, {MODEL: str(model)})
    assert_same_training(ktops / "out", plain / "out")


def test_grpo_script(model, tmp_path):
    """The loss of the first step is zero, so only updates are compared."""
    rewards = {
        "    args=": "    reward_funcs=lambda completions, **_: [len(str(text)) for text in completions],\n    args="
    }
    options = {"num_generations": 2, "max_completion_length": 12}
    ktops, plain = train_by_script("GRPO", tmp_path, {MODEL: str(model), **rewards}, **options)
    assert_same_updates(ktops / "out", plain / "out")


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        pytest.param("qwen3_moe", "sft", marks=pytest.mark.ci),
        ("qwen3_moe", "dpo"),
        ("deepseek_v3", "sft"),
        ("mixtral", "sft"),
    ],
)
def test_command(architecture, method, tmp_path):
    model = save_model(tmp_path / "model", architecture)
    options = ["--lora_target_modules", "q_a_proj"] if architecture == "deepseek_v3" else []
    launch = command(method, model, tmp_path, *options)
    assert launch[:2] == ["ktops", "launch"]
    ktops, plain = train_both(launch, launch[2:], tmp_path)
    assert_same_training(ktops / "out", plain / "out")
    assert_loads_without_ktops(model, ktops / "out", tmp_path / "peft")


def test_a_command_that_leaves_ktops_unused_is_an_error(model, tmp_path):
    options = ["--model_init_kwargs", '{"experts_implementation": "eager"}']
    printed, ran = run(*command("sft", model, tmp_path, *options), folder=tmp_path, succeeds=False)
    assert not ran
    assert "experts_implementation='eager'" in printed
