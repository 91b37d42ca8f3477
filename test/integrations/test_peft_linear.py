"""LoRA on the weights of linear layers: compared with PEFT's own path, which adds a dense delta."""

import peft
import pytest
import torch
from peft_models import Recorder, logits, loss_and_gradients, randomize
from tiny_models import tiny_model

import ktops
from ktops.integrations.lora_targets import lora_targets
from ktops.testing.budgets import relative_error

pytestmark = pytest.mark.usefixtures("enabled")


def adapted(width: int = 28) -> peft.PeftModel:
    """Returns a model with two random adapters on its dense MLP, its shared experts and its routed ones."""
    model = tiny_model("deepseek_v2", experts_implementation="ktops", moe_intermediate_size=width).double()
    modules, parameters = lora_targets(model, "gate_proj,up_proj,down_proj")
    assert any(name.endswith("shared_experts.up_proj.weight") for name in parameters)
    config = peft.LoraConfig(r=3, target_modules=modules, target_parameters=parameters)
    model = peft.get_peft_model(model, config)
    model.add_adapter("second", config)
    randomize(model)
    return model.eval()


def both(model: peft.PeftModel) -> None:
    model.base_model.set_adapter(["default", "second"])


def second(model: peft.PeftModel) -> None:
    model.set_adapter("second")


def scaled(model: peft.PeftModel) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.3)


def merged(model: peft.PeftModel) -> None:
    model.merge_adapter()


def without(model: peft.PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def test_equals_plain_peft():
    """The dense deltas of plain PEFT, after each change."""
    found = []
    for change in (lambda model: None, both, second, scaled, merged, without):
        model = adapted()
        change(model)
        actual = logits(model)
        ktops.disable()
        try:
            expected = logits(plain(model))
        finally:
            ktops.enable()
        assert relative_error(actual, expected) < 1e-12
        found.append(expected)
    one, two, *changed, merged_one, base = found
    assert relative_error(merged_one, one) < 1e-12
    assert min(relative_error(other, one) for other in (two, *changed, base)) > 1e-3


def plain(model: peft.PeftModel) -> peft.PeftModel:
    model.get_base_model().set_experts_implementation("eager")
    return model


def test_gradients_without_dense_deltas():
    model = adapted()
    weights = {p.shape for name, p in model.named_parameters() if name.endswith("proj.base_layer.weight")}
    with Recorder() as recorder:
        actual = loss_and_gradients(model)
    assert weights and not weights & recorder.shapes
    ktops.disable()
    try:
        with Recorder() as recorder:
            expected = loss_and_gradients(plain(model))
    finally:
        ktops.enable()
    assert weights <= recorder.shapes
    assert actual.keys() == expected.keys() and len(actual) > 10
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) < 1e-10, name


def names(model: peft.PeftModel) -> list[str]:
    return [name for name, _ in model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("width", [28, 48])
def test_on_quantized_layers(width, tmp_path):
    """Adapters may be added before or after, and reach the same layers; files do not differ."""
    model = adapted(width).float()
    expected = logits(model)
    ktops.quantize_linear(model)
    assert 0 < relative_error(logits(model), expected.double()) < 0.1
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    base = tiny_model("deepseek_v2", experts_implementation="ktops", moe_intermediate_size=width)
    ktops.quantize_linear(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    assert names(loaded) == [name for name in names(model) if ".second." not in name]
    model.set_adapter("default")
    assert torch.equal(logits(loaded), logits(model))
    for name, gradient in loss_and_gradients(loaded).items():
        assert gradient.isfinite().all() and gradient.any(), name


def test_quantized_layers_cannot_be_merged():
    model = tiny_model("deepseek_v2", experts_implementation="ktops", moe_intermediate_size=48)
    ktops.quantize_linear(model)
    config = peft.LoraConfig(target_modules=[], target_parameters=["shared_experts.up_proj.weight"])
    model = peft.get_peft_model(model, config)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="LoRA on up_proj in int8 cannot be merged"):
            merge()
