"""ms-swift through ktops, by its plugin file and by ``ktops launch``."""

from pathlib import Path

import pytest
from compare import (
    MODEL,
    TRAINING,
    assert_loads_without_ktops,
    assert_same_training,
    checkpoints,
    example,
    run,
    train_both,
)
from exports import assert_exports
from tiny import conversation, messages, save_model, save_records

PLUGIN = '--external_plugins "$(python -m ktops.integrations.swift)" --experts_impl ktops'


def preference(question: str, answer: str, worse: str) -> dict:
    return {"messages": messages(question, answer), "rejected_response": worse}


def text(question: str, answer: str, worse: str) -> dict:
    return {"messages": messages(question, answer)[1:]}


METHODS = {"sft": conversation, "pt": text, "rlhf --rlhf_type dpo": preference}

TEMPLATES = {"qwen3_moe": "qwen3_nothinking", "deepseek_v3": "deepseek_v2_5"}


def command(method: str, model: Path, folder: Path, architecture: str = "qwen3_moe") -> str:
    """Returns the documented command with other names and options."""
    data = save_records(folder / "train.jsonl", METHODS[method])
    names = {MODEL: str(model), "train.jsonl": str(data), "swift sft": f"swift {method}"}
    kind = f"--model_type {architecture} --template {TEMPLATES[architecture]} --torch_dtype float32"
    training = " ".join(f"--{name} {value}" for name, value in TRAINING.items())
    return f"{example('swift', names).strip()} {kind} {training}"


def plain(command: str) -> str:
    assert PLUGIN in command
    return command.replace(PLUGIN, "")


@pytest.mark.parametrize("method", METHODS)
def test_plugin(method, model, tmp_path):
    with_plugin = command(method, model, tmp_path)
    ktops, without = train_both(with_plugin, plain(with_plugin), tmp_path)
    assert_same_training(ktops, without)
    assert_loads_without_ktops(model, checkpoints(ktops)[-1], tmp_path / "peft")
    assert_exports(model, checkpoints(ktops)[-1], tmp_path / "exports")


def test_launch(tmp_path):
    model = save_model(tmp_path / "model", "deepseek_v3")
    with_plugin = command("sft", model, tmp_path, "deepseek_v3")
    without = plain(with_plugin).replace("--target_modules q_proj v_proj", "--target_modules q_a_proj")
    ktops, without = train_both(f"ktops launch {without}", without, tmp_path)
    assert_same_training(ktops, without)


def test_the_plugin_alone_is_an_error(model, tmp_path):
    """Without --experts_impl, ktops would be unused."""
    alone = command("sft", model, tmp_path).replace("--experts_impl ktops", "")
    printed, ran = run("bash", "-c", alone, folder=tmp_path / "ktops", succeeds=False)
    assert not ran
    assert "would run through ktops" in printed
