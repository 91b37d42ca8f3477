"""axolotl through ktops, by its plugin and by ``ktops launch``."""

from pathlib import Path

import pytest
import yaml
from compare import (
    MODEL,
    TRAINING,
    assert_loads_without_ktops,
    assert_same_training,
    example,
    run,
    train_both,
)
from tiny import conversation, messages, save_records

PLUGIN = ("plugins", "experts_implementation")

OPTIONS = {
    **{name: TRAINING[name] for name in ("learning_rate", "logging_steps", "max_steps", "save_steps")},
    "optimizer": "sgd",
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "sequence_len": 256,
    "bf16": False,
}


def preference(question: str, answer: str, worse: str) -> dict:
    asked, chosen = messages(question, answer)
    return {"messages": [asked], "chosen": chosen, "rejected": messages(question, worse)[1]}


def configuration(model: Path, folder: Path) -> dict:
    """Returns the documented configuration with other names and options."""
    data = save_records(folder / "train.jsonl", conversation)
    return yaml.safe_load(example("axolotl", {MODEL: str(model), "train.jsonl": str(data)})) | OPTIONS


def without(configuration: dict, *keys: str) -> dict:
    return {key: value for key, value in configuration.items() if key not in keys}


def command(configuration: dict, file: Path) -> str:
    """Writes a configuration; returns the documented command that trains with it."""
    file.write_text(yaml.safe_dump(configuration))
    return example("axolotl-command", {"config.yaml": str(file)}).strip()


def preferences(folder: Path) -> dict:
    data = save_records(folder / "pairs.jsonl", preference)
    kind = {"type": "chat_template.default", "ds_type": "json", "split": "train"}
    return {"rl": "dpo", "datasets": [{"path": str(data), **kind}]}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_plugin(method, model, tmp_path):
    options = configuration(model, tmp_path) | (preferences(tmp_path) if method == "dpo" else {})
    ktops, plain = train_both(
        command(options, tmp_path / "ktops.yaml"),
        command(without(options, *PLUGIN), tmp_path / "plain.yaml"),
        tmp_path,
    )
    assert_same_training(ktops, plain)
    assert_loads_without_ktops(model, ktops, tmp_path / "peft")


def test_launch(model, tmp_path):
    plain = command(without(configuration(model, tmp_path), *PLUGIN), tmp_path / "plain.yaml")
    assert_same_training(*train_both(f"ktops launch {plain}", plain, tmp_path))


def test_the_plugin_without_the_key_is_an_error(model, tmp_path):
    options = without(configuration(model, tmp_path), "experts_implementation")
    text = command(options, tmp_path / "ktops.yaml")
    printed, ran = run("bash", "-c", text, folder=tmp_path / "ktops", succeeds=False)
    assert not ran
    assert "needs `experts_implementation: ktops`" in printed
