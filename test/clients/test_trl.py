"""TRL's scripts and commands through ktops."""

import re
import sys
from pathlib import Path

import pytest
from compare import (
    MODEL,
    TRAINING,
    assert_loads_without_ktops,
    assert_same_training,
    assert_same_updates,
    example,
    run,
    train_both,
)
from exports import assert_exports
from tiny import conversation, messages, save_model, save_records


def preference(question: str, answer: str, worse: str) -> dict:
    prompt, chosen = messages(question, answer)
    return {"prompt": [prompt], "chosen": [chosen], "rejected": [messages(question, worse)[1]]}


def prompt(question: str, answer: str, worse: str) -> dict:
    return {"prompt": messages(question, answer)[:1]}


LAYOUTS = {"SFT": conversation, "DPO": preference, "GRPO": prompt}


def train_by_script(method: str, folder: Path, replacements: dict[str, str], **options) -> tuple[Path, Path]:
    """Trains by the documented script, with a method's trainer and config, and by its plain version."""
    options = {**TRAINING, "bf16": False, **options}
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    data = save_records(folder / "train.jsonl", LAYOUTS[method])
    names = {"SFT": method, "train.jsonl": str(data), 'output_dir="out"': f'output_dir="out"{arguments}'}
    script = example("trl", {**names, **replacements})
    plain = re.sub(r'^(import ktops|ktops\.).*\n|"experts_implementation": "ktops"', "", script, flags=re.M)
    files = folder / "with_ktops.py", folder / "plain.py"
    for file, text in zip(files, (script, plain), strict=True):
        file.write_text(text)
    return train_both(*(f"{sys.executable} {file}" for file in files), folder)


def command(method: str, model: Path, folder: Path, options: str = "") -> str:
    """Returns the documented command with other names and options."""
    (folder / "data").mkdir()
    save_records(folder / "data" / "train.jsonl", LAYOUTS[method.upper()])
    names = {MODEL: str(model), "my-dataset": str(folder / "data"), "trl sft": f"trl {method}"}
    training = " ".join(f"--{name} {value}" for name, value in {**TRAINING, "bf16": False}.items())
    return f"{example('trl-command', names).strip()} --dtype float32 {training} {options}"


def test_script(model, tmp_path):
    ktops, plain = train_by_script("SFT", tmp_path, {MODEL: str(model)})
    assert_same_training(ktops, plain)
    assert_loads_without_ktops(model, ktops, tmp_path / "peft")
    assert_exports(model, ktops, tmp_path / "exports")


def test_dpo_script(model, tmp_path):
    assert_same_training(*train_by_script("DPO", tmp_path, {MODEL: str(model)}))


def test_grpo_script(model, tmp_path):
    """The loss of the first step is zero, so only updates are compared."""
    rewards = "lambda completions, **_: [len(str(text)) for text in completions]"
    names = {MODEL: str(model), "    args=": f"    reward_funcs={rewards},\n    args="}
    options = {"num_generations": 2, "max_completion_length": 12}
    assert_same_updates(*train_by_script("GRPO", tmp_path, names, **options))


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
    options = "--lora_target_modules q_a_proj" if architecture == "deepseek_v3" else ""
    launch = command(method, model, tmp_path, options)
    ktops, plain = train_both(launch, launch.removeprefix("ktops launch "), tmp_path)
    assert_same_training(ktops, plain)
    assert_loads_without_ktops(model, ktops, tmp_path / "peft")


def test_examples_train_in_bfloat16(model, tmp_path):
    """TRL's default, which its trainer refuses without a GPU unless it is told to use the CPU."""
    (tmp_path / "data").mkdir()
    data = save_records(tmp_path / "data" / "train.jsonl", conversation)
    changes = {"train.jsonl": str(data), 'output_dir="out"': 'output_dir="out", max_steps=1'}
    script = example("trl", {MODEL: str(model), **changes})
    assert run(sys.executable, "-c", script, folder=tmp_path / "script")[1]
    text = example("trl-command", {MODEL: str(model), "my-dataset": str(data.parent)}).strip()
    assert run("bash", "-c", f"{text} --max_steps 1", folder=tmp_path / "command")[1]


def test_a_command_that_leaves_ktops_unused_is_an_error(model, tmp_path):
    options = """--model_init_kwargs '{"experts_implementation": "eager"}'"""
    text = command("sft", model, tmp_path, options)
    printed, ran = run("bash", "-c", text, folder=tmp_path / "ktops", succeeds=False)
    assert not ran
    assert "experts_implementation='eager'" in printed
