"""`ktops serve`, and what `transformers serve` loads under `ktops launch`; test/clients asks over HTTP."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.cli import transformers as transformers_cli
from transformers.cli.serving.model_manager import ModelManager
from transformers.utils import import_utils

import ktops
from ktops.cli import inference, serve
from ktops.cli.errors import UserError
from ktops.formats import ExpertWeight
from ktops.integrations.transformers import default
from ktops.nn.frozen_lora import FrozenLora
from ktops.testing.counts import counted

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35]])


@pytest.fixture
def hooked():
    """Changes transformers as its processes are under `ktops launch`."""
    serve.enable()
    yield
    serve.disable()
    default.disable()
    ktops.disable()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model_directory):
    """The directory of a random adapter, trained by `ktops finetune` on int4."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_directory), lora).save_pretrained(folder)
    options = {"model": str(model_directory), "weight_format": "int4", "group_size": 32}
    (folder / "options.json").write_text(json.dumps(options))
    return folder


def served(name, **options):
    """Returns what a server loads for the only model that it serves."""
    manager = ModelManager(device="cpu", force_model=str(name), **options)
    [loaded] = manager.loaded_models.values()
    loaded._timer.cancel()
    return loaded.model


def formats(model) -> set[str]:
    return {module.format for module in model.modules() if isinstance(module, ExpertWeight)}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


def test_an_adapter_is_loaded_with_its_model(hooked, model_directory, adapter):
    expected = AutoModelForCausalLM.from_pretrained(model_directory, experts_implementation="ktops")
    ktops.quantize_experts(expected, "int4", group_size=32, show_progress=False)
    expected = PeftModel.from_pretrained(expected, adapter).eval()
    model = served(adapter)
    assert formats(model) == {"int4"}
    assert torch.equal(logits(model), logits(expected))


def test_the_head_multiplies_one_row(hooked, adapter):
    """The last of a prompt, whose strides are those of a slice, by weights that PEFT has frozen."""
    model = served(adapter)
    assert not model.get_output_embeddings().weight.requires_grad
    with torch.no_grad(), counted() as counts:
        last = model(TOKENS, logits_to_keep=1).logits
    assert counts.operators["aten::bmm"] == 0 < counts.operators["aten::mm"]
    torch.testing.assert_close(last, logits(model)[:, -1:])


def test_experts_run_through_ktops(hooked, model_directory):
    expected = AutoModelForCausalLM.from_pretrained(model_directory, experts_implementation="eager")
    with ktops.profile() as profile:
        actual = logits(served(model_directory))
    assert profile.steps
    torch.testing.assert_close(actual, logits(expected))


def test_quantization(hooked, model_directory, adapter, capfd):
    assert formats(served(model_directory, quantization="int8")) == {"int8"}
    assert formats(served(adapter, quantization="int8")) == {"int8"}
    assert "was trained with --weight-format int4 --group-size 32, not with --weight-format int8" in (
        capfd.readouterr().err
    )
    with pytest.raises(ValueError, match=r"--quantization: expected one of bnb-4bit, .*int4.*, got 'int7'"):
        served(model_directory, quantization="int7")


def test_a_model_without_experts_is_an_error(hooked, tokenizer, tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ktops runs no experts of"):
        served(tmp_path)


@pytest.fixture
def server(monkeypatch, hooked):
    """Replaces the command line of transformers; returns a list of its arguments, and what it would serve."""
    started: list = []

    def app(arguments: list[str]) -> None:
        started.extend([arguments, served(arguments[1])])
        raise SystemExit(0)

    monkeypatch.setattr(transformers_cli, "app", app)
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: True)
    return started


def test_options_of_ktops_serve(ktops_command, server, model_directory, adapter):
    status, _, err = ktops_command(
        "serve", model_directory, "--adapter", adapter, "--weight-format", "int8", "--port", 8001,
        "--enable-cors",
    )  # fmt: skip
    assert status == 0, err
    arguments, model = server
    assert arguments == ["serve", str(model_directory), "--port", "8001", "--enable-cors"]
    assert formats(model) == {"int8"}
    assert any(isinstance(module, FrozenLora) for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ((), "f32"),
        (("--dtype", "auto"), "f32"),
        (("--dtype", "bfloat16"), "bf16"),
        (("--dtype=float16",), "bf16"),
    ],
)
def test_the_plan_has_the_dtype_of_the_server(
    ktops_command, server, model_directory, monkeypatch, arguments, dtype
):
    planned = []
    monkeypatch.setattr(inference, "check_chat", lambda model, *rest: planned.append(rest[0]))
    assert ktops_command("serve", model_directory, *arguments)[0] == 0
    assert planned == [dtype]


def test_errors_before_the_server_starts(ktops_command, server, model_directory, monkeypatch):
    for arguments, message in (
        (["missing"], "MODEL: no such directory"),
        ([model_directory, "--adapter", model_directory], "--adapter: .* has no adapter_config.json"),
        ([model_directory, "--weight-format", "int5"], "--weight-format int5: "),
    ):
        status, _, err = ktops_command("serve", *arguments, "--port", 8001)
        assert status == 1 and re.search(f"ktops: {message}", err)
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    status, _, err = ktops_command("serve", model_directory)
    assert (status, "pip install 'transformers[serving]'" in err) == (1, True)
    assert server == []
