"""lora_target in PEFT's terms: what gets adapters, checked on the model that PEFT then makes."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_batch, tiny_model
from torch import nn

from ktops.integrations.lora_targets import lora_targets

ATTENTION = {
    "qwen3_moe": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "deepseek_v3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
}


def adapted(architecture: str, target: str | list[str]) -> tuple[set[str], set[str]]:
    """Returns the linear layers, without the layer's number, and the stacked parameters that get adapters."""
    model = tiny_model(architecture)
    modules, parameters = lora_targets(model, target)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=modules, target_parameters=parameters))
    linear, stacked = set(), set()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            assert module.r == {"default": 2}
            if isinstance(module.get_base_layer(), nn.Linear):
                linear.add(name.partition("layers.")[2].partition(".")[2])
            else:
                stacked.add(module.parameter_name)
    return linear, stacked


@pytest.mark.parametrize("architecture", ATTENTION)
def test_attention_alone(architecture):
    linear, stacked = adapted(architecture, "all_attention")
    assert {name.rpartition(".")[2] for name in linear} == ATTENTION[architecture]
    assert not stacked


@pytest.mark.parametrize("architecture", ATTENTION)
def test_all(architecture):
    linear, stacked = adapted(architecture, "all")
    attention = {f"self_attn.{name}" for name in ATTENTION[architecture]}
    projections = ("gate_proj", "up_proj", "down_proj")
    mlps = {f"mlp.{part}{name}" for part in ("", "shared_experts.") for name in projections}
    assert linear == attention | (mlps if architecture == "deepseek_v3" else set())
    assert stacked == {"gate_up_proj", "down_proj"}


def test_names():
    linear, stacked = adapted("deepseek_v3", "kv_b_proj, down_proj, absent_proj")
    assert linear == {"self_attn.kv_b_proj", "mlp.down_proj", "mlp.shared_experts.down_proj"}
    assert stacked == {"down_proj"}


@pytest.mark.parametrize("name", ["experts", "w1", "gate_proj"])
def test_names_of_experts(name):
    linear, stacked = adapted("mixtral", ["q_proj", name])
    assert linear == {"self_attn.q_proj"}
    assert stacked == {"gate_up_proj"} | ({"down_proj"} if name == "experts" else set())


def test_a_name_that_matches_nothing():
    with pytest.raises(ValueError, match=r"lora_target query matches nothing in MixtralForCausalLM.*q_proj"):
        lora_targets(tiny_model("mixtral"), "query")


def test_adapters_on_everything_load(tmp_path):
    modules, parameters = lora_targets(tiny_model("deepseek_v3"), "all")
    config = LoraConfig(r=2, target_modules=modules, target_parameters=parameters, init_lora_weights=False)
    trained = get_peft_model(tiny_model("deepseek_v3"), config).eval()
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("deepseek_v3"), tmp_path).eval()
    with torch.no_grad():
        expected, actual = (model(**tiny_batch()).logits for model in (trained, loaded))
        assert torch.equal(actual, expected)
        with loaded.disable_adapter():
            assert not torch.equal(loaded(**tiny_batch()).logits, expected)
