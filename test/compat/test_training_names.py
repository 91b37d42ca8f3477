"""kt_kernel.sft as trainers use it: the configuration, adapters of experts, and what an optimizer trains."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import Recorder
from tiny_models import tiny_model
from tiny_wrapped import ALPHA, CONFIG, RANK, adapted, backward, logits, wrapped
from torch import nn

from ktops._warn import warn_once
from ktops.compat.kt_kernel import sft
from ktops.compat.kt_kernel.sft import (
    KTAMXConfigError,
    KTConfig,
    get_kt_named_trainable_params,
    kt_adapt_peft_lora,
    update_kt_lora_pointers,
)
from ktops.compat.kt_kernel.sft.config import field_names
from ktops.compat.lora import shapes
from ktops.testing.budgets import model_budget, relative_error

pytestmark = pytest.mark.usefixtures("single_thread", "installed")

BUDGET = model_budget(torch.float32, 64, 16)


def test_config_is_found_by_the_name_that_transformers_looks_for():
    import kt_kernel.sft.config

    assert KTConfig is kt_kernel.sft.config.KTConfig
    assert KTConfig.__module__ == "kt_kernel.sft.config"
    assert len(field_names()) == 29
    config = KTConfig(kt_backend="AMXINT8", kt_lora_rank=4)
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.kt_lora_alpha == 8.0


def test_config_takes_what_is_not_given_from_the_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_KT_BACKEND", "AMXINT4")
    monkeypatch.setenv("ACCELERATE_KT_LORA_RANK", "4")
    monkeypatch.setenv("ACCELERATE_KT_TP_ENABLED", "true")
    monkeypatch.setenv("ACCELERATE_KT_ACTIVATION_POLICY", '{"cpu": "retain", "gpu": "recompute"}')
    config = KTConfig(kt_lora_rank=2)
    assert (config.kt_backend, config.kt_lora_rank, config.kt_tp_enabled) == ("AMXINT4", 2, True)
    assert config.activation_policy.cpu == "retain"


def test_config_of_containers():
    mapping = {"kt_backend": "AMXINT8", "kt_lora_rank": 4}
    expected = KTConfig(**mapping)
    plugin = SimpleNamespace(enabled=True, kt_config=mapping)
    trainer = SimpleNamespace(config=expected, kt_checkpoint_files=["model.safetensors"])
    for given in (expected, {**mapping, "enabled": True}, plugin, SimpleNamespace(**mapping)):
        assert KTConfig.from_object(given) == expected
    assert KTConfig.from_object(trainer).kt_checkpoint_files == ["model.safetensors"]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"kt_bakend": "AMXBF16"}, TypeError, "kt_bakend"),
        ({"kt_backend": "AMX"}, ValueError, "kt_backend must be one of auto"),
        ({"kt_train_mode": "half"}, ValueError, "kt_train_mode must be one of lora, full, hybrid"),
        ({"kt_lora_rank": -1}, ValueError, "kt_lora_rank must be an integer, not negative, got -1"),
        ({"kt_lora_rank": 4, "kt_lora_alpha": 0}, ValueError, "kt_lora_alpha must be positive, got 0"),
        ({"kt_lora_dropout": 1}, ValueError, "kt_lora_dropout must be from 0 to below 1, got 1"),
        ({"kt_weight_path": "nowhere"}, ValueError, "kt_weight_path must name a checkpoint"),
        ({"kt_use_lora_experts": True}, ValueError, "kt_use_lora_experts must be absent"),
        ({"kt_activation_policy": {"cpu": "keep", "gpu": "retain"}}, ValueError, "cpu must be retain or"),
        ({"kt_activation_policy": {"cpu": "retain"}}, ValueError, "must have the keys cpu and gpu"),
    ],
)
def test_config_refuses(given, error, message):
    with pytest.raises(error, match=message):
        KTConfig.from_object(given)
    with pytest.raises(error, match=message):
        KTConfig.from_object(SimpleNamespace(**given))
    with pytest.raises(TypeError, match="got a str"):
        KTConfig.from_object("AMXBF16")


def test_adapters_change_nothing_at_first_and_get_gradients():
    base = tiny_model("qwen3_moe").eval()
    expected = logits(base)
    model = get_peft_model(wrapped(), LoraConfig(r=RANK, target_modules=["o_proj"]))
    result = kt_adapt_peft_lora(model)
    assert relative_error(logits(model), expected) <= BUDGET
    assert (result.adapted_layers, result.already_adapted_layers, result.placeholder_names) == (2, 0, ())
    sizes = shapes(8, 32, 24, RANK)
    assert [(name, list(parameter.shape)) for name, parameter in result.named_optimizer_parameters] == [
        (f"kt.layers.{layer}.experts.fused_lora.{name}", shape)
        for layer in range(2)
        for name, shape in sizes.items()
    ]
    model.train()
    backward(model)
    for name, parameter in result.named_optimizer_parameters:
        assert parameter.grad.isfinite().all() and bool(parameter.grad.any()) == name.endswith("_b"), name


def test_adapting_again_changes_nothing():
    model = adapted()
    before = get_kt_named_trainable_params(model)
    again = kt_adapt_peft_lora(model)
    assert (again.adapted_layers, again.already_adapted_layers) == (0, 2)
    pairs = zip(before, again.named_optimizer_parameters, strict=True)
    assert all(name == other and parameter is same for (name, parameter), (other, same) in pairs)
    owned = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in owned for _, parameter in before)


def dense_reference(model: nn.Module) -> nn.Module:
    """Returns a plain model whose experts' weights include the adapters of a wrapped one."""
    plain = tiny_model("qwen3_moe").eval()
    with torch.no_grad():
        for layer, wrapper in zip(plain.model.layers, sft.adaptation.find_wrappers(model), strict=True):
            gate_a, gate_b, up_a, up_b, down_a, down_b = wrapper.lora_params.values()
            update = torch.cat([gate_b @ gate_a, up_b @ up_a], dim=1)
            layer.mlp.experts.gate_up_proj += ALPHA / RANK * update
            layer.mlp.experts.down_proj += ALPHA / RANK * down_b @ down_a
    return plain


def test_adapters_add_to_the_experts_and_follow_those_of_peft():
    model = adapted()
    base = tiny_model("qwen3_moe").eval()
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "o_proj.lora_B" in name):
            parameter.zero_()
    assert relative_error(logits(model), logits(dense_reference(model))) <= BUDGET
    assert relative_error(logits(model), logits(base)) > 0.1
    with model.disable_adapter():
        assert relative_error(logits(model), logits(base)) <= BUDGET
    model.base_model.model._kt_wrappers[0].lora_params["down_lora_b"].data.zero_()
    assert relative_error(logits(model), logits(dense_reference(model))) <= BUDGET
    assert relative_error(logits(copy.deepcopy(model)), logits(model)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_have_the_dtype_of_what_is_trained(dtype):
    model = get_peft_model(wrapped(), LoraConfig(r=RANK, target_modules=["o_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    assert {p.dtype for _, p in kt_adapt_peft_lora(model).named_optimizer_parameters} == {dtype}


def test_skiplora_trains_nothing_of_the_experts():
    model = adapted(KTConfig(kt_backend="AMXBF16_SkipLoRA", kt_lora_rank=RANK))
    assert get_kt_named_trainable_params(model) == []
    backward(model)
    update_kt_lora_pointers(model)


def test_full_mode_trains_the_weights_of_the_experts():
    model = wrapped(KTConfig(kt_train_mode="full"))
    named = kt_adapt_peft_lora(model).named_optimizer_parameters
    assert [name for name, _ in named] == [
        f"kt.layers.{layer}.experts.base.{name}"
        for layer in range(2)
        for name in ("gate_up_proj", "down_proj")
    ]
    backward(model)
    assert all(parameter.grad.any() for _, parameter in named)
    with pytest.raises(KTAMXConfigError, match="kt_train_mode full trains the experts' own weights"):
        wrapped(KTConfig(kt_train_mode="full", kt_backend="AMXINT8"))


def test_dropout_of_adapters_is_said_to_have_no_effect():
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"kt_lora_dropout=0\.5 has no effect on the adapters of experts"):
        adapted(KTConfig(kt_lora_rank=RANK, kt_lora_dropout=0.5))


def test_settings_without_effect_are_said_once():
    warn_once.cache_clear()
    given = {"kt_tp_enabled": True, "kt_max_cache_depth": 2, "kt_model_max_length": 64}
    with pytest.warns(UserWarning, match="kt_kernel: kt_max_cache_depth, kt_tp_enabled have no effect"):
        wrapped(KTConfig(**given))


def test_training_that_leaves_ktops_unused_is_an_error():
    plain = tiny_model("qwen3_moe")
    for function in (
        kt_adapt_peft_lora,
        get_kt_named_trainable_params,
        update_kt_lora_pointers,
        sft.get_kt_rank_local_parameter_names,
        sft.sync_kt_lora_gradients,
    ):
        with pytest.raises(KTAMXConfigError, match="no experts of Qwen3MoeForCausalLM run through ktops"):
            function(plain)
    with pytest.raises(KTAMXConfigError, match="kt_lora_rank must be given"):
        kt_adapt_peft_lora(wrapped(KTConfig()))
    model = adapted()
    with pytest.raises(RuntimeError, match="has not computed the experts of layers 0, 1"):
        update_kt_lora_pointers(model)
    logits(model)
    with pytest.raises(RuntimeError, match=r"gate_lora_a and 11 more have no gradients"):
        update_kt_lora_pointers(model)
    backward(model)
    update_kt_lora_pointers(model)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KTAMXConfigError, match="in one process, got 2"):
        wrapped()


@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_checkpointing_runs_the_experts_again_only_if_told_to(policy):
    config = KTConfig(**{**vars(CONFIG), "kt_activation_policy": {"cpu": policy, "gpu": "recompute"}})
    model = adapted(config).train()
    expected = adapted(config).train()
    context_fn = sft.get_activation_checkpoint_context_fn()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context_fn})
    with Recorder() as recorder:
        backward(model)
    assert recorder.calls["moe_sft_fwd"] == (2 if policy == "retain" else 4)
    backward(expected)
    for (name, one), (_, other) in zip(
        get_kt_named_trainable_params(model), get_kt_named_trainable_params(expected), strict=True
    ):
        assert relative_error(one.grad, other.grad) <= BUDGET, name


def test_every_name_does_its_work_or_says_why_not():
    assert len(sft.__all__) == 94 and all(hasattr(sft, name) for name in sft.__all__)
    refusing = vars(sft.unsupported)
    for name in sft.__all__:
        if refusing.get(name) is getattr(sft, name):
            with pytest.raises(NotImplementedError, match=rf"^kt_kernel\.sft\.{name}: .+"):
                getattr(sft, name)()
