"""axolotl through ktops, by its plugin and by ``ktops launch``."""

import shutil
from pathlib import Path

import torch
import yaml
from compare import (
    MODEL,
    TRAINING,
    assert_loads_without_ktops,
    assert_same_training,
    checkpoints,
    example,
    read_adapter,
    run,
    train,
)
from exports import assert_exports
from safetensors.torch import save_file
from tiny import conversation, messages, save_records

PLUGIN = ("plugins", "experts_implementation")

OPTIONS = {
    **{name: TRAINING[name] for name in ("learning_rate", "logging_steps", "max_steps", "save_steps")},
    "optimizer": "sgd",
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "sequence_len": 256,
    "seed": 0,
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


def start_of(output: Path, folder: Path) -> str:
    """Saves the adapter with which a run began, which axolotl draws from no seed; returns its folder.

    As long as the factors B are zero, those of A have no gradients, so the first step leaves them.
    """
    first = checkpoints(output)[0]
    factors = {
        name: torch.zeros_like(value) if "lora_B" in name else value
        for name, value in read_adapter(first).items()
    }
    folder.mkdir()
    shutil.copy(first / "adapter_config.json", folder)
    save_file(factors, folder / "adapter_model.safetensors")
    return str(folder)


def test_plugin(model, tmp_path):
    options = configuration(model, tmp_path)
    ktops = train(command(options, tmp_path / "ktops.yaml"), tmp_path / "ktops", through_ktops=True)
    options = without(options, *PLUGIN) | {"lora_model_dir": start_of(ktops, tmp_path / "start")}
    plain = train(command(options, tmp_path / "plain.yaml"), tmp_path / "plain", through_ktops=False)
    assert_same_training(ktops, plain)
    assert_loads_without_ktops(model, ktops, tmp_path / "peft")
    assert_exports(model, ktops, tmp_path / "exports")


def test_dpo(model, tmp_path):
    """axolotl starts DPO from no given adapter, so there is no run to compare with."""
    options = configuration(model, tmp_path) | preferences(tmp_path)
    ktops = train(command(options, tmp_path / "ktops.yaml"), tmp_path / "ktops", through_ktops=True)
    assert_loads_without_ktops(model, ktops, tmp_path / "peft")


def test_launch(model, tmp_path):
    text = command(without(configuration(model, tmp_path), *PLUGIN), tmp_path / "options.yaml")
    ktops = train(f"ktops launch {text}", tmp_path / "ktops", through_ktops=True)
    assert_loads_without_ktops(model, ktops, tmp_path / "peft")


def test_the_plugin_without_the_key_is_an_error(model, tmp_path):
    options = without(configuration(model, tmp_path), "experts_implementation")
    text = command(options, tmp_path / "ktops.yaml")
    printed, ran = run("bash", "-c", text, folder=tmp_path / "ktops", succeeds=False)
    assert not ran
    assert "needs `experts_implementation: ktops`" in printed


def test_example_trains_in_bfloat16(model, tmp_path):
    """Which axolotl's trainer refuses without a GPU unless the plugin tells it to use the CPU."""
    options = configuration(model, tmp_path) | {"bf16": True, "max_steps": 1}
    assert run("bash", "-c", command(options, tmp_path / "config.yaml"), folder=tmp_path)[1]
