"""ktops as the default of transformers, and training that would not use it."""

import copy
import re

import pytest
import torch
from moe_blocks import LoopBlock
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_batch, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import ktops
from ktops.integrations import training
from ktops.integrations.transformers import default
from ktops.integrations.transformers.coverage import experts_outside_op


@pytest.fixture
def launched():
    """What ``ktops launch`` enables in transformers."""
    default.enable()
    training.enable()
    yield
    training.disable()
    default.disable()
    ktops.disable()


def config(**changes):
    return tiny_config("qwen3_moe", experts_implementation=None, **changes)


def implementation(model) -> str:
    return model.config._experts_implementation


def test_ktops_is_the_default(launched):
    assert implementation(AutoModelForCausalLM.from_config(config())) == "ktops"
    for name in ("eager", "grouped_mm"):
        model = AutoModelForCausalLM.from_config(config(), experts_implementation=name)
        assert implementation(model) == name
    default.disable()
    assert implementation(AutoModelForCausalLM.from_config(config())) != "ktops"


def test_the_default_outlives_disable(launched):
    """``ktops.disable()``, in a script that was launched, restores transformers, and ``enable()`` ktops."""
    ktops.disable()
    assert implementation(AutoModelForCausalLM.from_config(config())) != "ktops"
    ktops.enable()
    assert implementation(AutoModelForCausalLM.from_config(config())) == "ktops"
    ktops.disable()
    default.disable()
    assert implementation(AutoModelForCausalLM.from_config(config())) != "ktops"


def trainer(model, folder, steps: int = 2) -> Trainer:
    batch = tiny_batch(batch=4)
    rows = [{name: value[row] for name, value in batch.items()} for row in range(4)]
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    return Trainer(model, arguments, train_dataset=rows)


def test_training_with_ktops(launched, tmp_path, capsys):
    trainer(AutoModelForCausalLM.from_config(config()), tmp_path).train()
    assert (
        f"ktops runs the experts of 2 of 2 layers, with {ktops.cpu_capability()}\n" in capsys.readouterr().err
    )


def test_layers_that_another_implementation_runs_are_named(launched, tmp_path, capsys):
    model = AutoModelForCausalLM.from_config(config())
    experts = model.model.layers[1].mlp.experts
    experts.config = copy.copy(experts.config)
    experts.config._experts_implementation = "eager"
    trainer(model, tmp_path).train()
    said = "experts of 1 of 2 layers.*; qwen3_moe.*Experts has experts_implementation='eager'"
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny_model("qwen3_moe"), r"qwen3_moe.*Experts has experts_implementation='eager'"),
        (
            lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)),
            "the model has no Mixture-of-Experts layers",
        ),
        (lambda: AutoModelForCausalLM.from_config(config(hidden_act="tanh")), "ktops has no activation"),
    ],
    ids=["another implementation", "dense", "unsupported"],
)
def test_training_without_ktops(model, reason, launched, tmp_path):
    model = model()
    before = copy.deepcopy(model.state_dict())
    run = trainer(model, tmp_path)
    with pytest.raises(RuntimeError, match=f"nothing of .* would run through ktops: .*{reason}"):
        run.train()
    assert run.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_errors_name_the_base_of_a_peft_model():
    model = get_peft_model(
        AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)), LoraConfig(target_modules="all-linear")
    )
    with pytest.raises(RuntimeError, match="nothing of LlamaForCausalLM would run through ktops"):
        training.require_op(model)


def test_a_step_without_operators_is_an_error(launched, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "memory_stats", lambda: {"allocations": 0})
    run = trainer(AutoModelForCausalLM.from_config(config()), tmp_path)
    with pytest.raises(RuntimeError, match="no operator of ktops has run in a training step of Qwen3Moe"):
        run.train()
    assert run.state.global_step == 1


SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_one_layer_in_the_op_is_enough(launched):
    model = AutoModelForCausalLM.from_config(config())
    model.model.layers[0].mlp.experts.act_fn = torch.nn.Tanh()
    found, outside = experts_outside_op(model)
    assert found == 2 and list(outside) == ["model.layers.0.mlp.experts"]
    training.require_op(model)


def test_swapped_experts_are_in_the_op():
    model = tiny_model("qwen3_moe")
    assert len(experts_outside_op(model)[1]) == 2
    ktops.swap_experts(model)
    assert experts_outside_op(model) == (2, {})


def test_listed_experts_with_adapters_are_outside_the_op():
    model = torch.nn.Sequential(LoopBlock())
    assert "is not in the experts interface" in experts_outside_op(model)[1]["0.experts"]
    ktops.swap_experts(model)
    assert experts_outside_op(model) == (1, {})
    adapted = get_peft_model(model, LoraConfig(target_modules=["gate_proj"]))
    [reason] = experts_outside_op(adapted)[1].values()
    assert "adapters" in reason
