"""Several adapters on the experts of a model, from PEFT 0.20 on, and transformers' own adapter methods."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft_models import Recorder, adapted, compare, logits, loss_and_gradients, randomize
from tiny_models import tiny_batch, tiny_model

from ktops.integrations.peft import expert_target_parameters
from ktops.testing.budgets import forward_budget, relative_error

BUDGET = 2 * forward_budget(torch.float32, inner_size=64)

pytestmark = pytest.mark.usefixtures("enabled")


def add_second_adapter(model) -> None:
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["o_proj"], target_parameters=expert_target_parameters(model)
    )
    model.add_adapter("second", config)
    randomize(model, seed=2)


def test_several_active_adapters():
    def both(model):
        add_second_adapter(model)
        model.base_model.set_adapter(["default", "second"])

    # With seed 0, the two adapters together amplify rounding errors in the gradients tenfold, even in float32
    # eager experts, so comparing two sets of such errors says little.
    compare("qwen3_moe", change=both, seed=1)


def test_set_adapter_switches():
    def second(model):
        add_second_adapter(model)
        model.set_adapter("second")

    compare("qwen3_moe", change=second)
    model = adapted("qwen3_moe")
    first = model(**tiny_batch()).logits
    second(model)
    assert relative_error(model(**tiny_batch()).logits, first) > 0.05


def test_from_pretrained_and_load_adapter(tmp_path):
    first = adapted("mixtral", "eager")
    expected = logits(first)
    first.save_pretrained(tmp_path / "first")
    randomize(first, seed=2)
    first.save_pretrained(tmp_path / "second")

    base = tiny_model("mixtral", experts_implementation="ktops")
    model = PeftModel.from_pretrained(base, tmp_path / "first", is_trainable=True)
    with Recorder() as recorder:
        assert relative_error(logits(model), expected) < BUDGET
    assert recorder.calls == {"moe_fwd": 2}
    model.load_adapter(tmp_path / "second", "second")
    assert relative_error(logits(model), expected) < BUDGET
    model.set_adapter("second")
    assert relative_error(logits(model), logits(first)) < BUDGET
    assert len(loss_and_gradients(model)) > 1
    model.delete_adapter("second")
    model.set_adapter("default")
    assert relative_error(logits(model), expected) < BUDGET


def test_adapters_of_transformers_itself(tmp_path, monkeypatch):
    model = adapted("qwen3_moe")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    other = tiny_model("qwen3_moe", experts_implementation="ktops")
    with monkeypatch.context() as patch:
        # load_adapter of transformers 5.12 replaces the method for good
        patch.setattr(ParamWrapper, "update_layer", ParamWrapper.update_layer)
        other.load_adapter(str(tmp_path))
    with Recorder() as recorder:
        actual = logits(other)
    assert recorder.calls == {"moe_fwd": 2}
    assert not recorder.made_expert_stack(other)
    assert torch.equal(actual, expected)
