"""What --target adds adapters to, and their dropout."""

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from rich.console import Console

from ktops.cli.finetune.lora import add_adapters, targets
from ktops.cli.finetune.options import Options
from ktops.cli.finetune.report import Report
from ktops.cli.models import load_model


@pytest.fixture
def model(model_directory):
    return load_model(str(model_directory), torch.float32, "ktops")


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("target", "layers", "parameters", "absent"),
    [
        ("all", {"q_proj", "k_proj", "v_proj", "o_proj"}, EXPERTS, []),
        ("all_attention", {"q_proj", "k_proj", "v_proj", "o_proj"}, [], []),
        ("attention, experts", {"q_proj", "k_proj", "v_proj", "o_proj"}, EXPERTS, []),
        ("q_proj,kv_b_proj,down_proj", {"q_proj"}, EXPERTS[1:], ["kv_b_proj"]),
        ("self_attn.v_proj", {"v_proj"}, [], []),
    ],
)
def test_targets(model, target, layers, parameters, absent):
    found, others = targets(model, target)
    assert {name.rpartition(".")[2] for name in found.modules} == layers
    assert (found.parameters, others) == (parameters, absent)


def test_dropout_is_for_linear_layers(model, capsys):
    options = Options(lora_rank=2, lora_alpha=4.0, lora_dropout=0.25, target="q_proj,w1,kv_b_proj")
    adapted = add_adapters(model, options, Report(Console()))
    out = capsys.readouterr().out
    assert "--target: Qwen3MoeForCausalLM has no layers named kv_b_proj" in out
    assert "--lora-dropout 0.25 is for the adapters of linear layers; those of experts have none" in out
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        dropout = layer.lora_dropout["default"]
        if isinstance(layer, ParamWrapper):
            assert isinstance(dropout, torch.nn.Identity)
        else:
            assert dropout.p == 0.25
    assert {isinstance(layer, ParamWrapper) for layer in layers} == {True, False}


def test_without_adapters_on_experts_dropout_needs_no_words(model, capsys):
    options = Options(lora_rank=2, lora_alpha=4.0, lora_dropout=0.25, target="all", freeze_experts=True)
    adapted = add_adapters(model, options, Report(Console()))
    assert capsys.readouterr().out == ""
    assert not any(isinstance(module, ParamWrapper) for module in adapted.modules())
    assert adapted.peft_config["default"].lora_dropout == 0.25
