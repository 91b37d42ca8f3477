"""`ktops finetune` from the command line to the files that it writes."""

import json
import socket
from dataclasses import asdict

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ktops.cli.errors import UserError
from ktops.cli.finetune import corpus, verify
from ktops.cli.finetune.step_parts import PARTS
from ktops.cli.models import load_model

STEPS = 16


@pytest.fixture
def finetune(ktops_command, model_directory, data_file):
    def run(*arguments):
        return ktops_command(
            "finetune", "--model", model_directory, "--data", data_file, "--max-length", 96,
            "--lora-rank", 4, "--learning-rate", 0.05, "--eval-fraction", 0.2, *arguments,
        )  # fmt: skip

    return run


def expected_adapter(model_directory, rank: int) -> dict[str, torch.Size]:
    """Returns the names and shapes that plain PEFT writes for the same targets."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_directory, experts_implementation="eager")
    config = LoraConfig(
        r=rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    state = get_peft_model_state_dict(get_peft_model(model, config))
    return {name: tensor.shape for name, tensor in state.items()}


def test_own_model_and_data(finetune, model_directory, tmp_path):
    status, out, err = finetune("--max-steps", STEPS, "--output-dir", "out")
    assert (status, err) == (0, "")
    assert "reloaded in a fresh process" in out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [entry["step"] for entry in metrics["steps"]] == list(range(1, STEPS + 1))
    assert all(entry["seconds"] > 0 and entry["tokens"] > 0 for entry in metrics["steps"])
    for entry in metrics["steps"]:
        assert sum(entry["parts"].values()) == pytest.approx(entry["seconds"], abs=0.001)
    assert all(metrics["step_time"][part]["seconds"] > 0 for part in PARTS if part != "other matrices")
    assert metrics["held_out"]["after"]["loss"] < metrics["held_out"]["before"]["loss"] - 0.5
    assert metrics["tokens_per_second"] > 0 and metrics["peak_rss_bytes"] > 0
    assert 0 < metrics["kt_time"]["share"] < 1
    calls = {name: op["calls"] for name, op in metrics["kt_time"]["ops"].items()}
    assert calls == {"moe_sft_fwd": 2 * STEPS, "moe_sft_bwd": 2 * STEPS, "moe_fwd": 0}
    assert metrics["options"]["dtype"] == "bf16" and metrics["options"]["lora_alpha"] == 8
    assert set(metrics["versions"]) >= {"ktops", "python", "torch", "transformers", "peft"}
    assert metrics["reload"]["relative_difference"] <= metrics["reload"]["tolerance"] < 0.05
    assert metrics["reload"]["adapter_effect"] > metrics["reload"]["tolerance"]
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in adapter.items()} == expected_adapter(model_directory, 4)
    assert all(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)


class CountForwards(TorchDispatchMode):
    """Counts the forwards of experts that are computed for training."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        planned = any(isinstance(argument, FakeTensor) for argument in args)
        self.calls += func is torch.ops.kt.moe_sft_fwd.default and not planned
        return func(*args, **(kwargs or {}))


def test_checkpointing_computes_experts_once(finetune, reload_here):
    with CountForwards() as forwards:
        assert finetune("--max-steps", 3, "--gradient-checkpointing", "--eval-fraction", 0)[0] == 0
    assert forwards.calls == 3 * 2


def test_epochs_f32_accumulation_targets_and_other_experts(finetune, reload_here, tmp_path):
    status, _, err = finetune(
        "--epochs", 2, "--batch-size", 2, "--gradient-accumulation-steps", 5, "--dtype", "f32",
        "--target", "experts,q_proj", "--experts-implementation", "grouped_mm", "--lora-alpha", 4,
    )  # fmt: skip
    assert (status, err) == (0, "")
    metrics = json.loads((tmp_path / "ktops-finetune" / "metrics.json").read_text())
    assert len(metrics["steps"]) == 2 * 2  # 19 examples: 10 batches, 2 optimizer steps per epoch
    assert metrics["kt_time"]["share"] == 0
    adapter = load_file(tmp_path / "ktops-finetune" / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].split(".")[-1] for name in adapter} == {"q_proj", "experts", "base_layer"}
    config = json.loads((tmp_path / "ktops-finetune" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)


def test_data_in_several_layouts(ktops_command, reload_here, model_directory, tmp_path):
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    records = [
        {"messages": turns, "id": 1},
        {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"prompt": "Hello ", "completion": "you."},
        {"text": "Hello you."},
        {"instruction": "Greet.", "output": "Hello."},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    status, _, err = ktops_command(
        "finetune", "--model", model_directory, "--data", "data.json", "--max-steps", 1, "--lora-rank", 2,
        "--ignore-keys", "id, source", "--eval-fraction", 0.8, "--output-dir", "out",
    )  # fmt: skip
    assert (status, err) == (0, "")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["options"]["ignore_keys"] == "id, source"
    assert {sample["prompt"] for sample in metrics["samples"]} <= {"Hi.", "Hello ", "Greet."}
    status, _, err = ktops_command("finetune", "--resume", "--output-dir", "out", "--ignore-keys", "id")
    assert status == 1
    assert "--ignore-keys is id, source in the run to resume and can't be changed to id" in err
    assert ktops_command("finetune", "--resume", "--output-dir", "out", "--max-steps", 2)[0] == 0


def test_small_model_without_arguments_but_the_number_of_steps(
    ktops_command, reload_here, tmp_path, monkeypatch
):
    def refuse(*arguments):
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(corpus, "HELD_OUT", 1 / 64)  # evaluating on all of them takes longer than training
    status, out, err = ktops_command("finetune", "--pretrain-steps", 2, "--max-steps", 2)
    assert (status, err) == (0, "")
    for words in (
        "pretraining step 2/2",
        "fine-tuning step 2/2",
        "tokens/s, peak memory",
        "inside kt ops",
        "before",
        "after",
    ):
        assert words in out
    metrics = json.loads((tmp_path / "ktops-finetune" / "metrics.json").read_text())
    assert len(metrics["pretraining"]["steps"]) == len(metrics["steps"]) == 2
    assert metrics["pretraining"]["kt_time"]["share"] > 0
    assert len(metrics["samples"]) == 3 and set(metrics["samples"][0]) == {"prompt", "before", "after"}
    assert (tmp_path / "ktops-finetune" / "base" / "model.safetensors").is_file()


def test_reload_check_tells_a_damaged_adapter(finetune, reload_here, model_directory, tmp_path):
    assert finetune("--max-steps", 3, "--dtype", "f32", "--output-dir", "out")[0] == 0
    base = load_model(str(model_directory), torch.float32, "ktops")
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    record = verify.Record(
        base=str(model_directory),
        adapter=str(tmp_path / "out"),
        tensors=str(tmp_path / "logits.safetensors"),
        dtype="float32",
        experts_implementation="ktops",
        num_threads=torch.get_num_threads(),
    )
    tokens = torch.arange(20)[None]
    verify.write(record, tokens, verify.logits(model, tokens), tmp_path / "record.json")
    verify.require(verify.run(tmp_path / "record.json"))
    file = tmp_path / "out" / "adapter_model.safetensors"
    adapter = load_file(file)
    name = next(name for name in adapter if "experts" in name and "lora_B" in name)
    save_file({**adapter, name: adapter[name] * 1.01}, file)
    with pytest.raises(UserError, match="the reloaded adapter gives different logits"):
        verify.require(verify.run(tmp_path / "record.json"))
    save_file({name: torch.zeros_like(tensor) for name, tensor in adapter.items()}, file)
    unchanged = PeftModel.from_pretrained(
        load_model(str(model_directory), torch.float32, "ktops"), tmp_path / "out"
    )
    verify.write(record, tokens, verify.logits(unchanged, tokens), tmp_path / "record.json")
    with pytest.raises(UserError, match="the adapter does not change the model"):
        verify.require(verify.run(tmp_path / "record.json"))


def test_failing_reload_ends_with_status_1(finetune, monkeypatch):
    different = {
        "max_abs_difference": 1.0,
        "relative_difference": 0.5,
        "tolerance": 0.1,
        "adapter_effect": 1.0,
    }
    monkeypatch.setattr(verify, "run", lambda path: different)
    status, _, err = finetune("--max-steps", 1)
    assert status == 1 and "the reloaded adapter gives different logits: relative difference 5.00e-01" in err


def test_fresh_process_that_fails_is_told(tmp_path):
    record = verify.Record("nowhere", "nowhere", str(tmp_path / "none.safetensors"), "float32", "ktops", 1)
    (tmp_path / "record.json").write_text(json.dumps(asdict(record)))
    with pytest.raises(UserError, match=r"could not be loaded in a fresh process:(.|\n)*none\.safetensors"):
        verify.run(tmp_path / "record.json")


def test_fresh_process_takes_the_installed_ktops(tmp_path, monkeypatch):
    """This happens, for example, in a source tree whose extension is built elsewhere."""
    (tmp_path / "tree" / "ktops").mkdir(parents=True)
    (tmp_path / "tree" / "ktops" / "__init__.py").write_text("raise ImportError('not the installed one')")
    (tmp_path / "record").mkdir()
    monkeypatch.chdir(tmp_path / "tree")
    record = verify.Record("nowhere", "nowhere", "none.safetensors", "float32", "ktops", 1)
    path = tmp_path / "record" / "record.json"
    path.write_text(json.dumps(asdict(record)))
    with pytest.raises(UserError, match=r"none\.safetensors"):
        verify.run(path)
