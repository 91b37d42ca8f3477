"""`ktops finetune config.yaml`, from the file to the adapter."""

import json

import pytest
from safetensors.torch import load_file

from ktops.cli.finetune import corpus

TURNS = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]


@pytest.fixture
def write_config(model_directory, tmp_path):
    """Returns ``write(**changes)``, which writes config.yaml; None leaves a key out."""
    records = corpus.instructions()[0][:12]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "facts.json").write_text(json.dumps(records))
    (tmp_path / "data" / "chat.jsonl").write_text(json.dumps({"turns": TURNS}) + "\n")
    info = {
        "facts": {"file_name": "facts.json"},
        "chat": {"file_name": "chat.jsonl", "formatting": "sharegpt", "columns": {"messages": "turns"}},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    keys = {
        "model_name_or_path": str(model_directory), "trust_remote_code": True, "torch_dtype": "bfloat16",
        "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lora_target": "all",
        "use_kt": True, "kt_backend": "AMXBF16", "kt_num_threads": 1, "kt_tp_enabled": True,
        "dataset": "facts,chat", "template": "qwen3_nothink", "cutoff_len": 96,
        "per_device_train_batch_size": 4, "learning_rate": 0.01, "max_steps": 3,
        "lr_scheduler_type": "linear", "warmup_steps": 1, "logging_steps": 1, "save_steps": 2,
        "save_total_limit": 2, "output_dir": "out", "overwrite_output_dir": True, "report_to": "none",
    }  # fmt: skip

    def write(**changes: object) -> str:
        lines = [
            f"{key}: {json.dumps(value)}\n" for key, value in (keys | changes).items() if value is not None
        ]
        (tmp_path / "config.yaml").write_text("".join(lines))
        return "config.yaml"

    return write


def metrics_of(directory) -> dict:
    return json.loads((directory / "metrics.json").read_text())


def test_a_llamafactory_file_trains_and_resumes(ktops_command, reload_here, write_config, tmp_path):
    status, out, err = ktops_command("finetune", write_config())
    assert (status, err) == (0, "")
    assert "without effect in ktops finetune: trust_remote_code, kt_tp_enabled" in out
    assert "--lora-dropout 0.1 is for the adapters of linear layers" in out
    assert "13 examples, 0 held out" in out and "step 3/3" in out
    run = tmp_path / "out"
    metrics = metrics_of(run)
    rates = [step["learning_rate"] for step in metrics["steps"]]
    assert rates == pytest.approx([0, 0.01, 0.005])
    assert metrics["kt_time"]["ops"]["moe_sft_bwd"]["calls"] == 2 * 3
    assert metrics["held_out"] == {"before": None, "after": None} and metrics["quantization"] is None
    adapter = load_file(run / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapter} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "experts", "base_layer",
    }  # fmt: skip
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-3"}

    config = write_config(max_steps=5, resume_from_checkpoint="out/checkpoints/checkpoint-3")
    status, out, err = ktops_command("finetune", config)
    assert (status, err) == (0, "") and "continuing from out/checkpoints/checkpoint-3" in out
    assert [step["step"] for step in metrics_of(run)["steps"]] == [1, 2, 3, 4, 5]
    status, _, err = ktops_command("finetune", config)
    assert status == 1 and "checkpoint-3 is not the last checkpoint of the run in out, which is out/ch" in err
    status, _, err = ktops_command("finetune", write_config(lora_rank=8), "--resume", "--max-steps", 6)
    assert (status, err) == (
        1,
        "ktops: --resume: --lora-rank is 4 in the run to resume and can't be changed to 8. Leave it out, or "
        "start another run\n  --lora-rank is lora_rank in config.yaml, line 7\n",
    )


def test_experts_of_another_checkpoint_and_command_line(
    ktops_command, reload_here, write_config, model_directory, tmp_path
):
    assert ktops_command("convert", model_directory, "int8", "--weight-format", "int8")[0] == 0
    config = write_config(
        kt_backend="AMXInt8_SkipLoRA", kt_weight_path="int8", eval_strategy="steps", eval_steps=1, val_size=2,
        dataset="data/facts.json", template=None, lora_dropout=None, gradient_checkpointing=True,
    )  # fmt: skip
    status, out, err = ktops_command("finetune", config, "--max-steps", 2, "--lora-rank", 2)
    assert (status, err) == (0, "") and "template" not in out and "--lora-dropout" not in out
    assert "10 examples, 2 held out" in out and "step 1: held-out loss" in out
    metrics = metrics_of(tmp_path / "out")
    assert [entry["step"] for entry in metrics["evaluations"]] == [1, 2]
    assert metrics["options"]["experts_path"] == str(tmp_path / "int8")
    calls = {name: op["calls"] for name, op in metrics["kt_time"]["ops"].items()}
    assert calls == {"moe_sft_fwd": 8, "moe_sft_bwd": 4, "moe_fwd": 0}
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any("experts" in name for name in adapter)
    assert all(tensor.shape[0] == 2 for name, tensor in adapter.items() if "lora_A" in name)


def test_without_ktops_only_if_the_file_says_so(ktops_command, reload_here, write_config, tmp_path):
    config = write_config(use_kt=False, max_steps=1, warmup_steps=None)
    status, out, err = ktops_command("finetune", config)
    assert (status, err) == (0, "")
    assert "use_kt: false: transformers runs the experts (grouped_mm), not ktops" in out
    metrics = metrics_of(tmp_path / "out")
    assert metrics["kt_time"]["share"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rnak": 8}, "config.yaml, line 29: unknown key lora_rnak. Did you mean lora_rank? "),
        ({"lora_rank": "eight"}, "config.yaml, line 7: lora_rank is 'eight': expected a whole number\n"),
        ({"dataset": "fact"}, "Did you mean facts?\n  --data is dataset in config.yaml, line 15\n"),
        ({"dataset": "none.json"}, "--data: no such file: none.json, and no such name in "),
        ({"dataset_dir": "nowhere"}, "--dataset-dir: no dataset_info.json in "),
        ({"model_name_or_path": "Qwen/None"}, "no such directory: "),
        (
            {"lora_target": "q_prj"},
            "no linear layers named 'q_prj'. Use all, all_attention, attention, experts",
        ),
        ({"lora_target": "lm_head"}, "--target: lora_target lm_head matches nothing in Qwen3Moe"),
        ({"lora_target": "experts", "kt_backend": "INT8_SkipLoRA"}, "--target experts is only experts"),
        ({"optim": "paged_adamw_8bit"}, "--optimizer is optim in config.yaml, line "),
        ({"val_size": 20}, "--eval-examples 20: the data has 13 examples"),
        ({"eval_steps": 1, "eval_strategy": "steps"}, "--eval-steps needs held-out examples"),
    ],
)
def test_mistakes_leave_nothing_behind(ktops_command, write_config, tmp_path, changes, message):
    before = set(tmp_path.rglob("*")) | {tmp_path / "config.yaml"}
    status, _, err = ktops_command("finetune", write_config(**changes))
    assert status == 1 and err.startswith("ktops: ") and "Traceback" not in err
    assert message in err
    assert set(tmp_path.rglob("*")) == before


def test_a_model_without_experts_is_refused(ktops_command, write_config, tokenizer, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    status, _, err = ktops_command("finetune", write_config(model_name_or_path="dense"))
    assert status == 1
    assert "--model: unsupported architecture: LlamaForCausalLM has no routed experts that ktops runs" in err
    assert not (tmp_path / "out").exists()
