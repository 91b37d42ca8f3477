"""LLaMA-Factory, unmodified, under ``ktops launch``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from compare import (
    HERE,
    assert_loads_without_ktops,
    assert_same_training,
    checkpoints,
    example,
    losses,
    read_adapter,
    run,
)
from exports import assert_exports
from peft import PeftModel
from tiny import save_model, save_records
from transformers import AutoModelForCausalLM, AutoTokenizer

from ktops.testing.budgets import relative_error

OPTIONS = HERE / "llamafactory"

VARIANTS = {
    "minimal": ("minimal", {}),
    "full": ("full", {}),
    "without dropout": ("full", {"lora_dropout": 0}),
    "int8": ("full", {"kt_backend": "AMXInt8", "lora_dropout": 0}),
    "experts on the GPU": ("full", {"kt_num_gpu_experts": 1, "lora_dropout": 0}),
    "all": ("full", {"lora_target": "all", "lora_dropout": 0}),
    "all_attention": ("full", {"lora_target": "all_attention", "lora_dropout": 0}),
    "kt_config": ("kt_config", {}),
}
"""Name -> a file of options in the folder ``llamafactory``, and what differs from it."""

FLOAT32 = ("bf16=false", "torch_dtype=float32")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Tiny models by architecture; their vocabulary has room for the tokens that templates add."""
    names = ("qwen3_moe", "deepseek_v2", "deepseek_v3", "mixtral")
    return {name: save_model(tmp_path_factory.mktemp(name), name, vocab_size=512) for name in names}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A dataset_dir with one dataset for each stage."""
    folder = tmp_path_factory.mktemp("data")
    save_records(folder / "sft.jsonl", lambda q, a, _: {"instruction": q, "input": "", "output": a})
    save_records(folder / "pairs.jsonl", lambda q, a, w: {"instruction": q, "chosen": a, "rejected": w})
    save_records(
        folder / "kto.jsonl", lambda q, a, _: {"instruction": q, "output": a, "kto_tag": len(q) % 2 == 0}
    )
    save_records(folder / "text.jsonl", lambda q, a, _: {"text": f"{q} {a}"})
    pairs = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    tags = {"prompt": "instruction", "response": "output", "kto_tag": "kto_tag"}
    info = {
        "identity": {"file_name": "sft.jsonl"},
        "pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": pairs},
        "kto": {"file_name": "kto.jsonl", "columns": tags},
        "text": {"file_name": "text.jsonl", "columns": {"prompt": "text"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def options(folder: Path, name: str, **changes) -> Path:
    """Writes a file of options with changes; returns it."""
    given = yaml.safe_load((OPTIONS / f"{name}.yaml").read_text()) | changes
    file = folder / "options.yaml"
    file.write_text(yaml.safe_dump(given, sort_keys=False))
    return file


def launch(
    folder: Path, command: str, file: Path, *overrides: str, succeeds: bool = True
) -> tuple[str, bool]:
    """Runs ``llamafactory-cli`` under ``ktops launch``; returns what ``run`` does."""
    return run(
        "ktops", "launch", "llamafactory-cli", command, file, *overrides, folder=folder, succeeds=succeeds
    )


def short(model: Path, data: Path, output: Path, steps: int = 2) -> list[str]:
    """Returns overrides that train a model on the data for a few steps."""
    return [
        f"model_name_or_path={model}",
        f"dataset_dir={data}",
        f"output_dir={output}",
        f"max_steps={steps}",
        "gradient_accumulation_steps=1",
        "logging_steps=1",
        "cutoff_len=64",
        "learning_rate=0.01",
        "report_to=none",
    ]


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.ci if name == "minimal" else ()) for name in VARIANTS]
)
def test_options_of_the_usage_document(variant, models, data, tmp_path):
    name, changes = VARIANTS[variant]
    file = options(tmp_path, name, **changes)
    model = models["deepseek_v3" if name == "kt_config" else "deepseek_v2"]
    printed, ran = launch(tmp_path, "train", file, *short(model, data, tmp_path / "out"))
    assert ran
    assert losses(tmp_path / "out").isfinite().all()
    trained = read_adapter(tmp_path / "out")
    assert any("experts" in key for key in trained) == (variant != "all_attention")
    assert all(tensor.any() for key, tensor in trained.items() if "lora_B" in key)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["lora_dropout"]
    assert ("without effect: kt_tp_enabled" in printed) == (name == "full" and "GPU" not in variant)
    assert ("lora_dropout 0.1 applies to the adapters of linear layers" in printed) == (variant == "full")


def test_example_of_the_documentation(models, data, tmp_path):
    given = example("llamafactory", {"Qwen/Qwen3-30B-A3B": str(models["qwen3_moe"])})
    (tmp_path / "options.yaml").write_text(given)
    command = example("llamafactory-command", {}).split()
    assert run(*command, *short(models["qwen3_moe"], data, tmp_path / "out"), folder=tmp_path)[1]
    assert any("experts" in name for name in read_adapter(tmp_path / "out"))


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v2", "deepseek_v3", "mixtral"])
def test_equals_a_plain_run(architecture, models, data, tmp_path):
    file = options(tmp_path, "minimal", lora_target="all")
    outputs = tmp_path / "ktops", tmp_path / "plain"
    overrides = ["optim=sgd", "save_steps=1", "learning_rate=1", "lr_scheduler_type=constant"]
    first, second = ([*short(models[architecture], data, output, 3), *overrides] for output in outputs)
    assert launch(tmp_path, "train", file, *first)[1]
    config = outputs[0] / "adapter_config.json"
    plain = options(tmp_path, "minimal", use_kt=False)
    command = (sys.executable, HERE / "plain_llamafactory.py", config, plain)
    assert not run(*command, *second, folder=tmp_path)[1]
    assert_same_training(*outputs)
    assert_loads_without_ktops(models[architecture], outputs[0], tmp_path / "logits")
    assert_exports(models[architecture], outputs[0], tmp_path / "exports", architecture)


def test_exports_to_every_layout(models, data, tmp_path):
    """The document's list names dense layers, shared experts and experts, not the layer llama.cpp splits."""
    file = options(tmp_path, "full", lora_dropout=0)
    overrides = [*short(models["deepseek_v3"], data, tmp_path / "out"), *FLOAT32]
    assert launch(tmp_path, "train", file, *overrides)[1]
    adapted = read_adapter(tmp_path / "out")
    for part in ("layers.0.mlp.gate_proj", "shared_experts.gate_proj", "mlp.experts", "o_proj"):
        assert any(part in name for name in adapted), part
    assert not any("kv_b_proj" in name for name in adapted)
    assert_exports(models["deepseek_v3"], tmp_path / "out", tmp_path / "exports", "deepseek_v3")


def test_resumes(models, data, tmp_path):
    file = options(tmp_path, "full", lora_dropout=0, lr_scheduler_type="constant", save_steps=2)
    whole, rest = (
        [*short(models["qwen3_moe"], data, tmp_path / name, 4), *FLOAT32] for name in ("whole", "rest")
    )
    launch(tmp_path, "train", file, *whole)
    first = checkpoints(tmp_path / "whole")[0]
    assert launch(tmp_path, "train", file, *rest, f"resume_from_checkpoint={first}")[1]
    assert torch.equal(losses(tmp_path / "rest"), losses(tmp_path / "whole"))
    expected = read_adapter(tmp_path / "whole")
    for name, value in read_adapter(tmp_path / "rest").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("stage", "dataset"), [("dpo", "pairs"), ("kto", "kto"), ("pt", "text"), ("rm", "pairs")]
)
def test_stages(stage, dataset, models, data, tmp_path):
    file = options(tmp_path, "full", stage=stage, dataset=dataset, lora_dropout=0)
    _, ran = launch(tmp_path, "train", file, *short(models["qwen3_moe"], data, tmp_path / "out"), *FLOAT32)
    assert ran
    trained = read_adapter(tmp_path / "out")
    assert any(tensor.any() for key, tensor in trained.items() if "experts" in key and "lora_B" in key)


@pytest.mark.parametrize("key", ["kt_weight_path", "model_name_or_path"])
def test_converted_experts(key, models, data, tmp_path):
    converted = tmp_path / "converted"
    run("ktops", "convert", models["qwen3_moe"], converted, "--weight-format", "int8", folder=tmp_path)
    file = options(tmp_path, "full", kt_backend="auto", lora_dropout=0)
    overrides = [*short(models["qwen3_moe"], data, tmp_path / "out"), *FLOAT32, f"{key}={converted}"]
    assert launch(tmp_path, "train", file, *overrides)[1]
    reference = options(tmp_path, "full", kt_backend="AMXInt8", lora_dropout=0)
    overrides = [*short(models["qwen3_moe"], data, tmp_path / "reference"), *FLOAT32]
    assert launch(tmp_path, "train", reference, *overrides)[1]
    assert torch.equal(losses(tmp_path / "out"), losses(tmp_path / "reference"))


def test_processes_of_torchrun(models, data, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    file = options(tmp_path, "minimal")
    assert launch(tmp_path, "train", file, *short(models["qwen3_moe"], data, tmp_path / "out"))[1]
    assert any("experts" in name for name in read_adapter(tmp_path / "out"))


def test_without_the_launcher(models, data, tmp_path):
    """As in a notebook, with options in a dict."""
    given = yaml.safe_load((OPTIONS / "minimal.yaml").read_text())
    overrides = (text.split("=") for text in short(models["qwen3_moe"], data, tmp_path / "out"))
    given |= {key: yaml.safe_load(value) for key, value in overrides}
    code = (
        "from ktops.integrations import llamafactory; llamafactory.enable()\n"
        f"from llamafactory.train.tuner import run_exp; run_exp({given!r})"
    )
    assert run(sys.executable, "-c", code, folder=tmp_path)[1]
    assert any("experts" in name for name in read_adapter(tmp_path / "out"))


@pytest.fixture(scope="session")
def trained(models, data, tmp_path_factory) -> Path:
    """The output directory of a run on Qwen3-MoE, every linear layer and the experts."""
    folder = tmp_path_factory.mktemp("trained")
    file = options(folder, "full", lora_target="all", lora_dropout=0)
    launch(folder, "train", file, *short(models["qwen3_moe"], data, folder / "out", 4), *FLOAT32)
    return folder / "out"


def test_chat(trained, models, tmp_path):
    file = tmp_path / "chat.yaml"
    file.write_text(
        f"model_name_or_path: {models['qwen3_moe']}\nadapter_name_or_path: {trained}\n"
        "template: deepseek\nuse_kt: true\nkt_backend: AMXBF16\nmax_new_tokens: 4\n"
    )
    launched = ["ktops", "launch", "llamafactory-cli", "chat", file]
    witness = {"PYTHONPATH": str(HERE / "witness"), "KT_WITNESS": str(tmp_path / "witness")}
    environment = {**os.environ, **witness, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        launched, input="Hello\nexit\n", capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "witness").exists()


def test_exported_model_is_the_adapted_one(trained, models, tmp_path):
    """The merged model's logits equal those of base and adapter, both without ktops."""
    file = tmp_path / "export.yaml"
    file.write_text(
        f"model_name_or_path: {models['qwen3_moe']}\nadapter_name_or_path: {trained}\n"
        "template: deepseek\nuse_kt: true\nkt_backend: AMXInt8\ninfer_dtype: float32\n"
        f"export_dir: {tmp_path / 'merged'}\nexport_device: cpu\n"
    )
    printed, _ = launch(tmp_path, "export", file)
    assert "export writes dense weights" in printed
    tokens = AutoTokenizer.from_pretrained(trained)("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(models["qwen3_moe"])
        plain = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, trained)(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
    assert relative_error(merged, adapted) < 1e-5
    assert relative_error(plain, adapted) > 1e-2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kt_num_thread=2"], "unknown key kt_num_thread. Did you mean kt_num_threads?"),
        (["kt_backend=AMXBF61"], "kt_backend must be one of auto"),
        (["dataset=nowhere"], "nowhere"),
    ],
)
def test_mistakes(overrides, message, models, data, tmp_path):
    file = options(tmp_path, "full", lora_dropout=0)
    given = [*short(models["qwen3_moe"], data, tmp_path / "out"), *overrides]
    printed, ran = launch(tmp_path, "train", file, *given, succeeds=False)
    assert message in printed and not ran
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_dense_model(models, data, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(models["qwen3_moe"]).save_pretrained(tmp_path / "dense")
    overrides = short(tmp_path / "dense", data, tmp_path / "out")
    for use_kt in ({}, {"use_kt": None}):
        given = {"lora_target": "q_proj", **use_kt}
        file = options(tmp_path, "minimal", **given)
        printed, _ = launch(tmp_path, "train", file, *overrides, succeeds=False)
        assert "nothing of " in printed and "the model has no Mixture-of-Experts layers" in printed


TRAINING_LOOP = """
from ktops.integrations import llamafactory; llamafactory.enable()
from llamafactory.train.sft.workflow import run_sft
from llamafactory.hparams import get_train_args

names = ("model_args", "data_args", "training_args", "finetuning_args", "generating_args")
for changes in ({{}}, {{"max_steps": 20, "resume_from_checkpoint": {checkpoint!r}}}):
    run_sft(**dict(zip(names, get_train_args({options!r} | changes))))
"""
"""The usage document's 5.2: train, save at step 5, resume from there and go on."""


def test_training_loop_of_the_usage_document(models, data, tmp_path):
    out = tmp_path / "out"
    linear = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    options = {
        "model_name_or_path": str(models["deepseek_v2"]), "stage": "sft", "finetuning_type": "lora",
        "use_kt": True, "kt_backend": "AMXBF16", "kt_num_threads": 8, "lora_rank": 8, "lora_target": linear,
        "dataset": "identity", "dataset_dir": str(data), "template": "deepseek3", "cutoff_len": 256,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 10,
        "output_dir": str(out), "do_train": True, "save_steps": 5, "report_to": "none",
    }  # fmt: skip
    code = TRAINING_LOOP.format(options=options, checkpoint=str(out / "checkpoint-5"))
    assert run(sys.executable, "-c", code, folder=tmp_path)[1]
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 20
    assert any("experts" in name for name in read_adapter(out))
