"""`ktops finetune --weight-format`: LoRA on quantized experts, saved and loaded."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from model_files import save_model
from safetensors.torch import load_file, save_file

from ktops.checkpoints import experts
from ktops.cli.finetune import options as options_file
from ktops.cli.finetune import run as finetune
from ktops.cli.plan.machine import Memory

STEPS = 12


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    monkeypatch.setattr(finetune, "plot_loss", lambda *_: None)


def test_training_on_int4(ktops_command, reload_here, model_directory, data_file, tmp_path):
    status, out, err = ktops_command(
        "finetune", "--model", model_directory, "--data", data_file, "--max-length", 96, "--max-steps", STEPS,
        "--lora-rank", 4, "--learning-rate", 0.05, "--eval-fraction", 0.2, "--output-dir", "out",
        "--weight-format", "int4", "--group-size", 32, "--quantize-method", "mse",
    )  # fmt: skip
    assert (status, err) == (0, "")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    record = metrics["quantization"]
    assert (record["weight_format"], record["group_size"], record["method"]) == ("int4", 32, "mse")
    num_weights = 2 * 8 * 3 * 32 * 16
    assert record["bytes"] * record["ratio"] == record["bytes_before"] == 2 * num_weights
    assert record["ratio"] == 16 / ((2 * (4 + 16 / 32) + (4 + 16 / 16)) / 3)  # rows of down have 16 weights
    assert [layer["name"] for layer in record["layers"]] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert 0.05 < record["relative_error"] < 0.15
    assert f"{record['ratio']:.2f} times smaller" in out and "in int4, group 32 (bf16: 48.0 KiB" in out
    assert metrics["parameters"] > metrics["trainable_parameters"] + num_weights
    assert metrics["held_out"]["after"]["loss"] < metrics["held_out"]["before"]["loss"] - 0.5
    assert metrics["reload"]["max_abs_difference"] == 0 < metrics["reload"]["adapter_effect"]
    calls = {name: op["calls"] for name, op in metrics["kt_time"]["ops"].items()}
    assert calls == {"moe_sft_fwd": 2 * STEPS, "moe_sft_bwd": 2 * STEPS, "moe_fwd": 0}

    recorded = options_file.resumed(options_file.load(tmp_path / "out"), {"max_steps": STEPS + 1})
    assert (recorded.weight_format, recorded.group_size, recorded.quantize_method) == ("int4", 32, "mse")
    status, _, err = ktops_command("finetune", "--resume", "--output-dir", "out", "--weight-format", "int8")
    assert status == 1
    assert "--weight-format is int4 in the run to resume and can't be changed to int8" in err


def test_training_on_int8_linear_layers(ktops_command, reload_here, model_directory, data_file, tmp_path):
    status, out, err = ktops_command(
        "finetune", "--model", model_directory, "--data", data_file, "--max-length", 96, "--max-steps", STEPS,
        "--lora-rank", 4, "--learning-rate", 0.05, "--eval-fraction", 0.2, "--output-dir", "out",
        "--linear-format", "int8",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert re.search(r"9 linear layers: [\d.]+ KiB in int8 \(before: [\d.]+ KiB\)", out)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["held_out"]["after"]["loss"] < metrics["held_out"]["before"]["loss"] - 0.5
    assert metrics["reload"]["max_abs_difference"] == 0 < metrics["reload"]["adapter_effect"]
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert any("q_proj.lora_A" in name for name in names) and any("experts" in name for name in names)
    status, _, err = ktops_command(
        "finetune", "--model", model_directory, "--data", data_file, "--linear-format", "int4"
    )
    assert status == 1 and "--linear-format must be int8, got 'int4'" in err


def test_training_on_blocks_of_256(ktops_command, reload_here, tokenizer, data_file, tmp_path):
    save_model(
        tmp_path / "model", tokenizer, hidden_size=256, moe_intermediate_size=256, num_hidden_layers=1,
        num_experts=4,
    )  # fmt: skip
    status, out, err = ktops_command(
        "finetune", "--model", "model", "--data", data_file, "--max-length", 96, "--max-steps", 3,
        "--lora-rank", 4, "--learning-rate", 0.02, "--output-dir", "out",
        "--weight-format", "q4_k", "--quantize-method", "mse",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "experts: 432.0 KiB in q4_k (bf16: 1.5 MiB, 3.56 times smaller)" in out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["quantization"]["ratio"] == 16 / 4.5
    assert 0.06 < metrics["quantization"]["relative_error"] < 0.08
    assert metrics["held_out"]["after"]["loss"] < metrics["held_out"]["before"]["loss"] - 0.5
    assert metrics["reload"]["max_abs_difference"] == 0 < metrics["reload"]["adapter_effect"]


def write_fp8(source, folder) -> None:
    """The model with experts and attention in FP8, as DeepSeek and Qwen publish them, in one block each."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [
        name for name in tensors if re.search(r"(self_attn\..|experts\.\d+\..*)_proj\.weight", name)
    ]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.float().reshape(1, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": fp8}))


@pytest.mark.parametrize("name", [None, "int8"])
def test_attention_that_is_quantized_too(
    ktops_command, reload_here, model_directory, data_file, tmp_path, name
):
    """The published model, or one converted from it."""
    write_fp8(model_directory, tmp_path / "model")
    if name is not None:
        assert ktops_command("convert", "model", "converted", "--weight-format", name)[0] == 0
    status, _, err = ktops_command(
        "finetune", "--model", "model" if name is None else "converted", "--data", data_file,
        "--max-length", 96, "--max-steps", 3, "--lora-rank", 4, "--learning-rate", 0.05,
        "--output-dir", "out",
    )  # fmt: skip
    assert (status, err) == (0, "")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["reload"]["max_abs_difference"] == 0 < metrics["reload"]["adapter_effect"]
    assert metrics["held_out"]["after"]["loss"] < metrics["held_out"]["before"]["loss"]
    calls = {name: op["calls"] for name, op in metrics["kt_time"]["ops"].items()}
    assert calls == {"moe_sft_fwd": 6, "moe_sft_bwd": 6, "moe_fwd": 0}


LOAD = """
import resource, sys, torch, transformers
from types import SimpleNamespace
import ktops
from ktops.cli.plan.machine import Memory
from ktops.cli.errors import UserError
from ktops.cli.models import load_base
from ktops.formats import ExpertWeight

torch.set_num_threads(1)

def load(directory, weight_format):
    options = SimpleNamespace(
        experts_path=None, mmap=False, weight_format=weight_format, group_size=None, quantize_method=None,
        experts_implementation="ktops",
    )
    model, _ = load_base(directory, torch.bfloat16, options)
    formats = {module.format for module in model.modules() if isinstance(module, ExpertWeight)}
    return formats, model(torch.tensor([[1, 2, 3]])).logits.isfinite().all().item()

small, wide, limit, weight_format = sys.argv[1:]
load(small, "int8")
with open("/proc/self/status") as file:
    (used,) = [int(line.split()[1]) << 10 for line in file if line.startswith("VmData")]
resource.setrlimit(resource.RLIMIT_DATA, (used + int(limit),) * 2)
try:
    print(*load(wide, weight_format or None))
except (UserError, MemoryError) as error:
    print("refused")
    print(repr(error), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def wide_model(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("wide") / "model"
    save_model(
        directory, tokenizer, hidden_size=256, moe_intermediate_size=256, num_experts=64, num_hidden_layers=4
    )
    return directory


@pytest.mark.parametrize(("weight_format", "printed"), [("", "refused"), ("int4", "{'int4'} True")])
def test_dense_experts_never_exist(model_directory, wide_model, tmp_path, weight_format, printed):
    """Memory is limited to less than the dense experts take in bfloat16, beyond what a small model needs and
    the file, which transformers maps writable."""
    limit = 4 * 64 * 3 * 256 * 256 * 2 * 3 // 4 + (wide_model / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", LOAD, model_directory, wide_model, str(limit), weight_format]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{printed}\n"), result.stderr
    # transformers passes on the error of a failed allocation, or prints it and raises one without its text.
    assert ("memory" in result.stderr.lower()) == (not weight_format)


def test_experts_where_they_lie_in_the_files(
    ktops_command, reload_here, tokenizer, data_file, tmp_path, monkeypatch
):
    """The adapter trained on mapped experts is bit for bit that trained on experts in memory.

    Those of other dtypes than the model's may be added up in another order.
    """
    save_model(
        tmp_path / "model", tokenizer, hidden_size=128, moe_intermediate_size=32, num_hidden_layers=1,
        dtype="bfloat16",
    )  # fmt: skip
    file = tmp_path / "model" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    saved, mapped, map_windows = [], [], experts.map_windows
    monkeypatch.setattr(experts, "map_windows", lambda *a: mapped.append(a) or map_windows(*a))
    for options in ([], ["--mmap"]):
        status, _, err = ktops_command(
            "finetune", "--model", "model", "--data", data_file, "--max-length", 96, "--max-steps", 2,
            "--lora-rank", 4, "--eval-fraction", 0, "--output-dir", "out", "--overwrite", *options,
        )  # fmt: skip
        assert (status, err) == (0, "")
        saved.append((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
    assert saved[0] == saved[1] and len(mapped) == 4  # both projections, in training and when reloading
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["reload"]["max_abs_difference"] == 0 < metrics["reload"]["adapter_effect"]


@pytest.mark.parametrize(
    "command",
    [
        ("finetune", "--data", "{data}", "--model"),
        ("chat", "--prompt", "Hello", "{model}", "--experts-path"),
        ("chat", "--prompt", "Hello"),
        ("serve",),
        ("plan",),
    ],
)
def test_experts_are_not_quantized_twice(ktops_command, model_directory, data_file, monkeypatch, command):
    """The command is refused before it loads anything; `ktops plan` has the same error."""
    monkeypatch.setattr("ktops.cli.models.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    monkeypatch.setattr("transformers.cli.transformers.app", lambda arguments: pytest.fail("started"))
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    assert ktops_command("convert", model_directory, "converted", "--weight-format", "int8")[0] == 0
    values = {"{data}": data_file, "{model}": model_directory}
    arguments = [values.get(argument, argument) for argument in command]
    status, _, err = ktops_command(*arguments, "converted", "--weight-format", "int4")
    assert status == 1, err
    assert "converted are already quantized, to int8. Leave the option out, or name the original" in err


def test_formats_that_quantized_experts_cannot_have_are_not_proposed(
    ktops_command, model_directory, monkeypatch
):
    assert ktops_command("convert", model_directory, "converted", "--weight-format", "int8")[0] == 0
    monkeypatch.setattr("ktops.cli.plan.needs.read_memory", lambda: Memory(1, 1))
    plan = json.loads(ktops_command("plan", "converted", "--json")[1])
    assert not plan["chat"]["fits"] and plan["chat"]["change"] is None
