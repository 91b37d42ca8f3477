"""Names of modules that PEFT, from 0.19 on, translates into parameters of the experts."""

import warnings

import pytest
from peft import LoraConfig, get_peft_model
from peft_models import adapted, compare
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("enabled")


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_names_of_transformers_4(architecture):
    lora = {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"], "target_parameters": None}
    model = adapted(architecture, lora=lora)
    ranks = {w.parameter_name: w.r["default"] for w in model.modules() if hasattr(w, "parameter_name")}
    assert ranks == {"gate_up_proj": 8, "down_proj": 4}
    compare(architecture, lora=lora)


def test_all_linear_adapts_the_router_too():
    lora = {"target_modules": "all-linear", "target_parameters": None}
    modules = adapted("qwen3_moe", lora=lora).modules()
    names = {module.parameter_name for module in modules if hasattr(module, "parameter_name")}
    assert names == {"gate_up_proj", "down_proj", "weight"}
    compare("qwen3_moe", lora=lora)


@pytest.mark.parametrize("names", ["all-linear", ["gate_proj", "up_proj", "down_proj"]], ids=str)
def test_names_that_reach_the_experts_give_no_warning(names):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(tiny_model("qwen3_moe"), LoraConfig(target_modules=names))
    assert not [w for w in caught if "routed experts" in str(w.message)]
