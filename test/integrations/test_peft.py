"""Compares PEFT's LoRA on experts through the op with PEFT's own path on the eager model."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraVariant, ParamWrapper
from peft.tuners.tuners_utils import BaseTuner
from peft_models import (
    Recorder,
    adapted,
    assert_as_close,
    compare,
    logits,
    loss_and_gradients,
    randomize,
    stable_seed,
)
from tiny_models import ARCHITECTURES, tiny_batch, tiny_model
from torch.nn import Module

import ktops
from ktops.integrations.peft import _lora_arguments, expert_target_parameters
from ktops.nn.layout import Layout
from ktops.ops.activation import ExpertFunction
from ktops.testing.budgets import forward_budget, relative_error
from ktops.testing.counts import counted

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

pytestmark = pytest.mark.usefixtures("enabled")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_as_plain_peft(architecture):
    compare(architecture, train_routers=True)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe"])
def test_bfloat16_base_with_float32_adapters(architecture):
    model = adapted(architecture, dtype=torch.bfloat16)
    dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32}
    assert model(**tiny_batch()).logits.dtype == torch.bfloat16
    compare(architecture, torch.bfloat16, train_routers=True, seed=stable_seed(architecture))


def test_bfloat16_adapters():
    seed = stable_seed("qwen3_moe")
    compare("qwen3_moe", torch.bfloat16, seed=seed, change=lambda model: model.to(model.dtype))


def test_one_call_a_layer_and_no_dense_delta():
    model = adapted("qwen3_moe")
    with Recorder() as recorder:
        loss_and_gradients(model)
    layers = model.config.num_hidden_layers
    assert recorder.calls == {"moe_sft_fwd": layers, "moe_sft_bwd": layers}
    assert not recorder.made_expert_stack(model)
    with Recorder() as recorder, torch.no_grad():
        model(**tiny_batch())
    assert recorder.calls == {"moe_fwd": layers}
    assert not recorder.made_expert_stack(model)


@pytest.mark.parametrize("parameter", EXPERTS)
def test_adapter_on_one_of_the_parameters(parameter):
    compare("qwen3_moe", lora={"target_parameters": [parameter]})


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 1},
        {"r": 5, "use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {".*down_proj": 3}, "alpha_pattern": {".*gate_up_proj": 11}},
        {"target_modules": []},
    ],
    ids=["rank 1", "rslora", "patterns", "experts only"],
)
def test_ranks_and_scalings(lora):
    compare("mixtral", lora=lora)


def test_a_parameter_the_op_takes_no_factors_for():
    """Biases use PEFT's own path on a module that runs the op."""
    torch.manual_seed(0)
    block = torch.nn.ModuleDict({"experts": ktops.nn.KTExperts(8, 32, 24, bias=True)})
    x, ids, weights = torch.randn(5, 32), torch.randint(8, (5, 2)), torch.rand(5, 2)
    names = ["experts.down_proj", "experts.gate_up_proj", "experts.gate_up_proj_bias"]
    model = get_peft_model(block, LoraConfig(r=2, target_modules=[], target_parameters=names))
    randomize(model)
    with Recorder() as recorder:
        actual = model.base_model.model["experts"](x, ids, weights)
    assert recorder.calls == {"moe_sft_fwd": 1} and not recorder.made_expert_stack(model)
    merged = model.merge_and_unload()["experts"]
    assert relative_error(actual, merged(x, ids, weights)) < 2 * forward_budget(torch.float32)


def test_scale_of_an_adapter_can_be_changed():
    def scale(model):
        for module in model.modules():
            if hasattr(module, "parameter_name"):
                module.set_scale("default", 0.5)

    compare("olmoe", change=scale)


def test_disable_adapter():
    model = adapted("qwen3_moe")
    base = logits(tiny_model("qwen3_moe", experts_implementation="ktops"))
    with_adapter = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), with_adapter)
    assert relative_error(with_adapter, base) > 0.05


def test_merge_and_unmerge():
    model, plain = adapted("qwen3_moe"), adapted("qwen3_moe", "eager")
    unmerged, budget = logits(model), forward_budget(torch.float32)
    for each in (model, plain):
        each.merge_adapter()
    assert_same_parameters(model, plain)
    with Recorder() as recorder:
        merged = logits(model)
    assert recorder.calls["moe_fwd"] == 2 and not recorder.made_expert_stack(model)
    assert relative_error(merged, unmerged) < budget
    with model.disable_adapter():
        base = logits(model)
    assert relative_error(base, logits(tiny_model("qwen3_moe"))) < budget
    assert relative_error(logits(model), unmerged) < budget, "PEFT unmerges where adapters are disabled"


def assert_same_parameters(model, other) -> None:
    for (name, actual), (expected_name, expected) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert name == expected_name
        assert torch.equal(actual, expected), name


def test_merge_and_unload():
    model, plain = adapted("qwen3_moe"), adapted("qwen3_moe", "eager")
    unmerged = logits(model)
    model, plain = model.merge_and_unload(), plain.merge_and_unload()
    assert_same_parameters(model, plain)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert relative_error(logits(model), unmerged) < forward_budget(torch.float32)


def test_unload():
    model = adapted("qwen3_moe").unload()
    assert torch.equal(logits(model), logits(tiny_model("qwen3_moe", experts_implementation="ktops")))


def test_frozen_adapter_gets_no_gradient():
    model = adapted("qwen3_moe", lora={"inference_mode": True})
    assert not any(p.requires_grad for p in model.parameters())
    with Recorder() as recorder:
        model(**tiny_batch())
    assert recorder.calls == {"moe_fwd": 2}


def test_expert_base_weights_train_beside_the_adapter():
    def unfreeze(model):
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.requires_grad_()

    results = []
    for implementation, dtype in (("ktops", None), ("eager", None), ("eager", torch.float64)):
        model = adapted("qwen3_moe", implementation, compute_dtype=dtype)
        unfreeze(model)
        results.append(loss_and_gradients(model))
    assert any(name.endswith("gate_up_proj") for name in results[0])
    assert_as_close(*results, torch.float32)


def test_swapped_experts():
    model = adapted("qwen3_moe", "eager")
    expected = loss_and_gradients(model)
    assert len(ktops.swap_experts(model)) == 2
    with Recorder() as recorder:
        actual = loss_and_gradients(model)
    assert recorder.calls == {"moe_sft_fwd": 2, "moe_sft_bwd": 2}
    assert not recorder.made_expert_stack(model)
    exact = loss_and_gradients(adapted("qwen3_moe", "eager", compute_dtype=torch.float64))
    assert_as_close(actual, expected, exact, torch.float32)
    ktops.unswap_experts(model)
    with Recorder() as recorder:
        loss_and_gradients(model)
    assert not recorder.calls


def test_swapping_is_enough():
    """LoRA on swapped experts uses the op even without ktops.enable()."""
    ktops.disable()
    model = adapted("qwen3_moe", "eager")
    ktops.swap_experts(model)
    with Recorder() as recorder:
        loss_and_gradients(model)
    assert recorder.calls == {"moe_sft_fwd": 2, "moe_sft_bwd": 2}
    assert not recorder.made_expert_stack(model)


def test_swapped_before_the_adapters():
    model = tiny_model("mixtral")
    ktops.swap_experts(model)
    assert expert_target_parameters(model) == EXPERTS
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["o_proj"], target_parameters=EXPERTS)
    model = get_peft_model(model, config)
    randomize(model)
    assert torch.equal(logits(model), logits(adapted("mixtral")))
    assert model.state_dict().keys() == adapted("mixtral", "eager").state_dict().keys()


def test_autocast():
    results = []
    for implementation, dtype in (("ktops", None), ("eager", None), ("eager", torch.float64)):
        model = adapted("qwen3_moe", implementation, compute_dtype=dtype, seed=stable_seed("qwen3_moe"))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            results.append(loss_and_gradients(model))
    assert_as_close(*results, torch.bfloat16)


def test_other_models_keep_the_path_of_peft():
    model = adapted("qwen3_moe", "eager")
    with Recorder() as recorder:
        before = loss_and_gradients(model)
    assert not recorder.calls
    ktops.disable()
    after = loss_and_gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_disable_gives_peft_its_methods_back():
    def methods():
        return ParamWrapper.forward, BaseTuner.inject_adapter

    patched = methods()
    ktops.enable()
    assert methods() == patched, "a second enable does nothing"
    for _ in range(2):
        ktops.disable()
        assert [method.__module__ for method in methods()] == [
            "peft.tuners.lora.layer",
            "peft.tuners.tuners_utils",
        ]


def test_an_older_peft_keeps_its_path(monkeypatch):
    ktops.disable()
    forward = ParamWrapper.forward
    monkeypatch.setattr("peft.__version__", "0.17.1")
    with pytest.warns(UserWarning, match=r"peft>=0.18 for LoRA on experts, found 0\.17\.1"):
        ktops.enable()
    assert ParamWrapper.forward is forward


def test_variants_take_the_path_of_peft():
    model = adapted("qwen3_moe")
    for module in model.modules():
        if hasattr(module, "parameter_name"):
            module.lora_variant["default"] = LoraVariant()
    with (
        Recorder() as recorder,
        pytest.warns(UserWarning, match="does not compute the LoRA variant LoraVariant"),
    ):
        actual = logits(model)
    assert recorder.made_expert_stack(model)
    assert relative_error(actual, logits(adapted("qwen3_moe", "eager"))) < 2 * forward_budget(torch.float32)


def test_float16_base_with_float32_adapters():
    compare("qwen3_moe", torch.float16, seed=stable_seed("qwen3_moe"))


def test_weights_the_op_does_not_read_take_the_path_of_peft(monkeypatch):
    from ktops.integrations.transformers import architectures

    monkeypatch.setattr(architectures, "DTYPES", (torch.float64,))
    model = adapted("qwen3_moe")
    with Recorder() as recorder, pytest.warns(UserWarning, match="Qwen3MoeExperts: .*float32"):
        actual = logits(model)
    assert not recorder.calls
    assert torch.equal(actual, logits(adapted("qwen3_moe", "grouped_mm")))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout != 0"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_errors_of_peft(lora, message):
    with pytest.raises(ValueError, match=message):
        adapted("qwen3_moe", lora={"target_modules": [], **lora})


def test_mixed_batches_are_refused():
    model = adapted("qwen3_moe").eval()
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        model(**tiny_batch(), adapter_names=["default", "__base__"])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "swap",
    [
        {},
        {"_did_swap_in_out_features": False},
        {"_did_swap_in_out_features": True},
        {"_swapped_in_out": True},
    ],
)
def test_factors_in_the_layout_of_every_version(swap, transposed):
    """The op's B A is the delta of PEFT's formula, whichever side of the stack PEFT took for its input."""
    swapped = any(swap.values())
    stored_in, stored_out = (7, 6) if swapped else (6, 7)  # the stack is [E, 6, 7]
    a, b = torch.randn(5 * 2, stored_in), torch.randn(stored_out, 2 * 5)
    factors = {"lora_A": {"x": SimpleNamespace(weight=a)}, "lora_B": {"x": SimpleNamespace(weight=b)}}
    wrapper = SimpleNamespace(
        parameter_name="down_proj", r={"x": 2}, scaling={"x": 0.5}, get_base_layer=Module, **factors, **swap
    )
    equation = "ore,eri->eoi" if swapped else "ore,eri->eio"
    delta = 0.5 * torch.einsum(equation, b.reshape(stored_out, 2, 5), a.reshape(5, 2, stored_in))
    layout = Layout(ExpertFunction(), transposed=transposed)
    given = _lora_arguments(wrapper, layout, ["x"])
    product = given["down_scaling"] * given["down_lora_B"] @ given["down_lora_A"]
    assert relative_error(product.mT if transposed else product, delta) < 1e-6


def test_a_call_with_adapters_adds_views_and_no_copies():
    model = adapted("qwen3_moe")
    experts = model.base_model.model.model.layers[0].mlp.experts
    x, ids = torch.ones(5, model.config.hidden_size), torch.arange(10).view(5, 2) % 4
    weights = torch.ones(5, 2)
    with torch.no_grad(), counted() as counts:
        output = experts(x, ids, weights)
    assert counts.allocations == [output.nbytes] and counts.operators["kt::moe_fwd"] == 1
    assert counts.operators.total() <= 28, counts.operators
