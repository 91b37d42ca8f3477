"""KTransformers' unmodified fork of LLaMA-Factory and the libraries below it, with ktops' kt_kernel."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from compare import HERE, INNER_SIZE, LAYER_OPERATIONS, losses, run
from safetensors.torch import load_file
from tiny import save_model, save_records
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ktops
from ktops.testing.budgets import SAFETY, model_budget, relative_error, rms

STEPS = 3
RANK, ALPHA = 4, 8
FUSED = "fused_expert_lora.safetensors"


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A dataset_dir with a dataset for sft and one for dpo."""
    folder = tmp_path_factory.mktemp("data")
    save_records(folder / "sft.jsonl", lambda q, a, _: {"instruction": q, "input": "", "output": a})
    save_records(folder / "pairs.jsonl", lambda q, a, w: {"instruction": q, "chosen": a, "rejected": w})
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {
        "sft": {"file_name": "sft.jsonl"},
        "pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": columns},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    return {name: save_model(tmp_path_factory.mktemp(name), name) for name in ("qwen3_moe", "deepseek_v3")}


def options(folder: Path, model: Path, data: Path, **changes) -> Path:
    """Writes a file of options for a short run with output in folder / "out"; None removes an option."""
    given = {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_target": "all",
        "use_kt": True,
        "dataset": "sft",
        "dataset_dir": str(data),
        "template": "alpaca",
        "cutoff_len": 64,
        "output_dir": str(folder / "out"),
        "overwrite_output_dir": True,
        "logging_steps": 1,
        "save_steps": 1,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "report_to": "none",
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "options.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))
    return file


def train(folder: Path, model: Path, data: Path, **changes) -> Path:
    """Trains under ``ktops launch``; returns the output directory."""
    file = options(folder, model, data, **changes)
    _, ran = run("ktops", "launch", "llamafactory-cli", "train", file, folder=folder)
    assert ran
    return folder / "out"


def fails(folder: Path, model: Path, data: Path, **changes) -> str:
    """Returns what a run prints that must fail before its first step."""
    file = options(folder, model, data, **changes)
    printed, _ = run("ktops", "launch", "llamafactory-cli", "train", file, folder=folder, succeeds=False)
    assert not list((folder / "out").glob("*/trainer_state.json"))
    return printed


def train_without_kt(folder: Path, start: Path, model: Path, data: Path, **changes) -> tuple[Path, Path]:
    """Trains in plain PyTorch from an adapter; returns the output directory and the trained experts' file."""
    given = {"use_kt": False, "adapter_name_or_path": str(start), **changes}
    file, trained = options(folder, model, data, **given), folder / FUSED
    _, ran = run(sys.executable, HERE / "plain_fork.py", start, trained, file, folder=folder)
    assert not ran
    return folder / "out", trained


def budget() -> float:
    return model_budget(torch.float32, INNER_SIZE, STEPS * LAYER_OPERATIONS)


def assert_same_updates(actual: Path, plain: Path, start: Path) -> None:
    """Asserts that the tensors in two files have changed by the same since the start, but for rounding."""
    actual, plain, start = (load_file(file) for file in (actual, plain, start))
    assert actual.keys() == plain.keys() == start.keys()
    for name, value in plain.items():
        update = value - start[name]
        rounded = SAFETY * rms(value.dtype) * math.sqrt(2 * STEPS) * (value.norm() / update.norm()).item()
        assert relative_error(actual[name] - start[name], update) <= budget() + rounded, name


@pytest.fixture(scope="session")
def starts(models, data, tmp_path_factory) -> dict[str, Path]:
    """Adapters that a first step has made nonzero, by architecture."""
    folder = tmp_path_factory.mktemp("starts")
    return {name: train(folder / name, model, data, max_steps=1) for name, model in models.items()}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_equals_a_plain_run(architecture, models, starts, data, tmp_path):
    model, start = models[architecture], starts[architecture]
    output = train(tmp_path / "kt", model, data, adapter_name_or_path=str(start))
    plain, trained = train_without_kt(tmp_path / "plain", start, model, data)
    assert len(losses(output)) == STEPS
    assert relative_error(losses(output), losses(plain)) <= budget()
    assert_same_updates(output / FUSED, trained, start / FUSED)
    others = (folder / "adapter_model.safetensors" for folder in (output, plain, start))
    assert_same_updates(*others)


def test_files_for_peft_hold_the_same_updates(starts):
    """The updates of every expert, from KTransformers' file and from PEFT's by the formulas of either."""
    start = starts["qwen3_moe"]
    kt = load_file(start / FUSED)
    folder = start / "exported" / "peft"
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for layer in range(2):
        factors = {name.split(".")[-1]: value for name, value in kt.items() if f"layers.{layer}." in name}
        own = {
            each: factors[f"{each}_lora_b"] @ factors[f"{each}_lora_a"] * ALPHA / RANK
            for each in ("gate", "up", "down")
        }
        experts = f"base_model.model.model.layers.{layer}.mlp.experts"
        num_experts = len(own["down"])
        for key, expected in (
            (f"{experts}.base_layer", torch.cat([own["gate"], own["up"]], dim=1)),
            (experts, own["down"]),
        ):
            a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
            a, b = a.unflatten(0, (num_experts, -1)), b.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
            pattern = [value for name, value in config["alpha_pattern"].items() if "gate_up" in name]
            alpha = pattern[0] if key.endswith("base_layer") else config["lora_alpha"]
            assert expected.any()
            assert relative_error(b @ a * alpha / a.shape[1], expected) < 1e-6


def test_resumes(models, data, tmp_path):
    given = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 4}
    whole = train(tmp_path / "whole", models["qwen3_moe"], data, **given)
    checkpoint = whole / "checkpoint-2"
    rest = train(
        tmp_path / "rest", models["qwen3_moe"], data, resume_from_checkpoint=str(checkpoint), **given
    )
    assert torch.equal(losses(rest), losses(whole))
    for name in (FUSED, "adapter_model.safetensors"):
        expected, found = load_file(whole / name), load_file(rest / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_skiplora_trains_what_the_fork_trains_without_kt(models, data, tmp_path):
    model, changes = models["qwen3_moe"], {"kt_config": {"kt_backend": "AMXBF16_SkipLoRA"}}
    output = train(tmp_path / "kt", model, data, **changes)
    file = options(tmp_path / "plain", model, data, use_kt=False)
    assert not run("llamafactory-cli", "train", file, folder=tmp_path / "plain")[1]
    assert relative_error(losses(output), losses(tmp_path / "plain" / "out")) <= budget()
    assert not (output / FUSED).exists()


@torch.no_grad()
def save_rounded(model: Path, folder: Path, weight_format: str) -> Path:
    """Saves a model whose experts hold the values that a weight format stores."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    for name, parameter in loaded.named_parameters():
        if "experts" in name and "shared" not in name:
            parameter.copy_(ktops.quantize(parameter, weight_format).dequantize())
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def test_weights_in_a_format(models, starts, data, tmp_path):
    """int8 experts, whether ktops quantizes the model's or reads a converted checkpoint."""
    model, start = models["qwen3_moe"], starts["qwen3_moe"]
    rounded = save_rounded(model, tmp_path / "rounded", "int8")
    plain, trained = train_without_kt(tmp_path / "plain", start, rounded, data)
    run(
        "ktops",
        "convert",
        model,
        tmp_path / "converted",
        "--weight-format",
        "int8",
        folder=tmp_path / "convert",
    )
    given = {"adapter_name_or_path": str(start)}
    for name, changes in {
        "backend": {"kt_config": {"kt_backend": "AMXINT8"}},
        "path": {"kt_weight_path": str(tmp_path / "converted")},
    }.items():
        output = train(tmp_path / name, model, data, **given, **changes)
        assert relative_error(losses(output), losses(plain)) <= budget()
        assert_same_updates(output / FUSED, trained, start / FUSED)


def test_full_fine_tuning(models, data, tmp_path):
    lora = dict.fromkeys(("lora_rank", "lora_alpha", "lora_target"))
    given = {**lora, "finetuning_type": "full", "learning_rate": 0.1}
    output = train(tmp_path / "kt", models["qwen3_moe"], data, **given)
    file = options(tmp_path / "plain", models["qwen3_moe"], data, use_kt=False, **given)
    assert not run("llamafactory-cli", "train", file, folder=tmp_path / "plain")[1]
    plain = tmp_path / "plain" / "out"
    assert relative_error(losses(output), losses(plain)) <= budget()
    name = "model.safetensors"
    assert_same_updates(output / name, plain / name, models["qwen3_moe"] / name)


def test_dpo(models, starts, data, tmp_path):
    """The reference is the model without its adapters, so the first loss is not that of two equal models."""
    model, start = models["qwen3_moe"], starts["qwen3_moe"]
    given = {"stage": "dpo", "dataset": "pairs", "cutoff_len": 256, "learning_rate": 0.1}
    output = train(tmp_path / "kt", model, data, adapter_name_or_path=str(start), **given)
    plain, trained = train_without_kt(tmp_path / "plain", start, model, data, **given)
    assert abs(losses(output)[0] - math.log(2)) > 1e-3
    assert relative_error(losses(output), losses(plain)) <= budget()
    assert_same_updates(output / FUSED, trained, start / FUSED)


def test_chat(models, starts, tmp_path):
    file = tmp_path / "chat.yaml"
    given = {"use_kt": True, "template": "alpaca", "max_new_tokens": 2, "infer_backend": "huggingface"}
    paths = {"model_name_or_path": models["qwen3_moe"], "adapter_name_or_path": starts["qwen3_moe"]}
    file.write_text(yaml.safe_dump({**given, **{key: str(path) for key, path in paths.items()}}))
    printed, ran = run(
        "ktops", "launch", "llamafactory-cli", "chat", file, folder=tmp_path, typed="Hello\nexit\n"
    )
    assert ran and "Assistant:" in printed


def test_mistakes(models, starts, data, tmp_path):
    model = models["qwen3_moe"]
    assert "kt_bakend" in fails(tmp_path / "key", model, data, kt_config={"kt_bakend": "AMXBF16"})
    assert "kt_backend must be one of auto" in fails(
        tmp_path / "value", model, data, kt_config={"kt_backend": "AMX"}
    )
    dense = tmp_path / "dense"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes)).save_pretrained(dense)
    AutoTokenizer.from_pretrained(model).save_pretrained(dense)
    assert "not supported" in fails(tmp_path / "architecture", dense, data)
    assert "no experts of" in fails(tmp_path / "scratch", model, data, train_from_scratch=True)
    damaged = shutil.copytree(starts["qwen3_moe"], tmp_path / "damaged")
    content = (damaged / FUSED).read_bytes()
    (damaged / FUSED).write_bytes(content[:-4] + b"\0\0\0\1")
    assert "damaged or changed" in fails(tmp_path / "file", model, data, adapter_name_or_path=str(damaged))
