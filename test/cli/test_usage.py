"""Exit statuses and messages: every mistake gives a message without a traceback."""

import json
import sys

import pytest

import ktops
from ktops.cli.errors import UserError
from ktops.cli.finetune import run_directory


@pytest.fixture
def refused(ktops_command, model_directory, data_file, tmp_path):
    """Runs a finetune that must fail with status 1 and leave no files; returns its message."""

    def run(*arguments, model=model_directory, data=data_file) -> str:
        status, out, err = ktops_command(
            "finetune", "--model", model, "--data", data, "--output-dir", "refused", *arguments
        )
        assert (status, out) == (1, "")
        assert err.startswith("ktops: ") and "Traceback" not in err
        return err

    return run


def model_with(tmp_path, **config):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_version_and_help(ktops_command):
    assert ktops_command("--version") == (0, f"ktops {ktops.__version__}\n", "")
    status, out, _ = ktops_command("--help")
    assert status == 0 and "finetune" in out and "info" in out
    status, out, _ = ktops_command("finetune", "--help")
    assert status == 0 and "--resume" in out and "--lora-rank" in out


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["finetune", "--nonsense"], ["finetune", "--max-steps", "x"]]
)
def test_wrong_usage_has_status_2(ktops_command, arguments):
    status, _, err = ktops_command(*arguments)
    assert status == 2 and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-steps", 0], "--max-steps must be positive, got 0"),
        (["--lora-rank", -1], "--lora-rank must be positive, got -1"),
        (["--learning-rate", "nan"], "--learning-rate must be positive, got nan"),
        (["--lora-alpha", "inf"], "--lora-alpha must be positive, got inf"),
        (["--eval-fraction", 1], "--eval-fraction must be at least 0 and below 1, got 1.0"),
        (["--dtype", "int8"], "--dtype must be bf16 or f32, got 'int8'"),
        (["--pretrain-steps", 3], "--pretrain-steps is only for the small model"),
        (["--resume", "--overwrite"], "--resume and --overwrite cannot be combined"),
        (["--resume"], "--resume: no run in refused"),
        (["--max-length", 3], "--max-length 3: no example has its answer within that many tokens"),
        (["--target", "q_proj,nonsense"], "Qwen3MoeForCausalLM has no linear layers named 'nonsense'"),
        (["--target", ","], "--target: ',' matches nothing"),
        (["--experts-implementation", "nonsense"], "nonsense"),
        (
            ["--weight-format", "int3"],
            "--weight-format int3: format must be one of bf16, fp16, fp32, int8, int4,",
        ),
        (
            ["--weight-format", "int4", "--group-size", 7],
            "--weight-format int4: group_size must be one of 0, any",
        ),
        (
            ["--weight-format", "int4", "--quantize-method", "hqq"],
            "--weight-format int4: method must be one of rtn, mse for format 'int4', got 'hqq'",
        ),
        (["--group-size", 32], "--group-size needs --weight-format"),
        (["--mmap", "--weight-format", "int4"], "cannot be combined with --weight-format"),
        (
            ["--mmap", "--experts-implementation", "eager"],
            "--mmap needs --experts-implementation ktops, got eager",
        ),
        (
            ["--weight-format", "int4", "--experts-implementation", "eager"],
            "--weight-format needs --experts-implementation ktops, got eager",
        ),
        (
            ["--weight-format", "q4_0"],
            "--weight-format q4_0: model.layers.0.mlp.experts: format 'q4_0' needs rows of a multiple of 32",
        ),
    ],
)
def test_bad_options(refused, arguments, message):
    assert message in refused(*arguments)


def test_model_and_data_need_each_other(ktops_command, model_directory):
    status, _, err = ktops_command("finetune", "--model", model_directory)
    assert status == 1 and "--model needs --data. Without both" in err


def test_an_adapter_in_place_of_a_model(refused, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "models/base"}')
    assert "is an adapter, not a model. Pass the model that it was trained on, models/base" in refused(
        "--model", tmp_path
    )


def test_bad_model_directories(refused, tmp_path):
    assert "no such directory" in refused(model=tmp_path / "nowhere")
    assert "has no config.json" in refused(model=tmp_path)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nonsense"}, "unsupported architecture"),
        ({"model_type": "vit"}, "unsupported architecture 'vit' in .*: not a causal language model"),
        ({"model_type": "qwen3_moe"}, "has no *.safetensors file"),
        (
            {"model_type": "new_moe", "auto_map": {"AutoConfig": "new.Config"}},
            "unsupported architecture 'new_moe' in .*: transformers .* does not have it, and code from model",
        ),
    ],
)
def test_bad_models(refused, tmp_path, config, message):
    import re

    err = refused(model=model_with(tmp_path, **config))
    assert re.search(message.replace("*.s", r"\*\.s"), err)


def test_model_without_experts(refused, tmp_path, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    assert "LlamaForCausalLM has no routed experts" in refused(model=tmp_path / "dense")


def test_bad_data_leaves_an_old_run_alone(ktops_command, model_directory, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "metrics.json").write_text("{}")
    status, _, err = ktops_command(
        "finetune", "--model", model_directory, "--data", "nowhere.json", "--output-dir", old, "--overwrite"
    )
    assert status == 1 and "no such file" in err
    assert (old / "metrics.json").read_text() == "{}"


TOOL_RECORD = {
    "messages": [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]},
    ],
    "tools": [{"name": "weather", "parameters": {}}],
}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (TOOL_RECORD, "leave out tool_calls of message 2 (assistant), tools"),
        ({"instruction": "a", "output": "b", "source": "web"}, "source. Give the model a template"),
        ({"text": "a", "source": "web"}, "the layout text does not use the keys ['source']"),
    ],
)
def test_data_that_the_template_leaves_out_is_refused_and_an_old_run_left_alone(
    refused, tmp_path, record, message
):
    (tmp_path / "data.jsonl").write_text(f"{json.dumps({'text': 'a'})}\n{json.dumps(record)}\n")
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / "metrics.json").write_text("{}")
    err = refused("--overwrite", data=tmp_path / "data.jsonl")
    assert f"{tmp_path / 'data.jsonl'}, line 2" in err and message in err and "--ignore-keys" in err
    assert (tmp_path / "refused" / "metrics.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is empty"),
        ("\n\n", "is empty"),
        ("{}", "line 1: the record is empty"),
        ('{"text": "a"}\n', "has one example; at least two are needed, because one is held out"),
    ],
)
def test_files_with_less_than_two_examples(refused, tmp_path, text, message):
    (tmp_path / "data.jsonl").write_text(text)
    assert message in refused("--eval-fraction", 0.5, data=tmp_path / "data.jsonl")


def test_last_complete_checkpoint(tmp_path):
    """The process may have been killed while Trainer wrote its state."""
    assert run_directory.last_checkpoint(tmp_path) is None
    for steps, state in ((5, "{}"), (10, "{}"), (15, '{"global_step": 1')):
        folder = tmp_path / f"checkpoint-{steps}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
    assert run_directory.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_output_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    first = run_directory.choose(None, resume=False, overwrite=False)
    assert str(first) == "ktops-finetune"
    run_directory.prepare(first, overwrite=False)
    (first / "metrics.json").write_text("{}")
    (first / "notes.txt").write_text("mine")
    second = run_directory.choose(None, resume=False, overwrite=False)
    assert str(second) == "ktops-finetune-2"
    assert run_directory.choose(None, resume=True, overwrite=False) == first
    with pytest.raises(UserError, match=r"already holds a run\. Add --resume"):
        run_directory.choose(first, resume=False, overwrite=False)
    run_directory.prepare(run_directory.choose(first, resume=False, overwrite=True), overwrite=True)
    assert [path.name for path in first.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="is not a directory"):
        run_directory.choose(first / "notes.txt", resume=False, overwrite=False)


@pytest.mark.parametrize(
    ("command", "package"), [("info", "typer"), ("finetune", "peft"), ("info", "psutil")]
)
def test_missing_packages(ktops_command, monkeypatch, command, package):
    monkeypatch.setitem(sys.modules, package, None)
    status, out, err = ktops_command(command)
    assert (status, out) == (1, "")
    assert f"not installed: {package}" in err and "pip install 'ktops[cli]'" in err


def test_interrupted_before_a_command_begins(ktops_command, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("ktops.cli.app.app", interrupt)
    assert ktops_command("info") == (130, "", "Interrupted.\n")


def test_processes_of_another_launcher(ktops_command, monkeypatch, tmp_path):
    """accelerate would connect them, and train each on its own."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    status, out, err = ktops_command("finetune")
    assert (status, out) == (1, "")
    assert err.startswith("ktops: several processes must be started by torchrun, got OMPI_COMM_WORLD_SIZE=2 ")
    assert not list(tmp_path.iterdir())
