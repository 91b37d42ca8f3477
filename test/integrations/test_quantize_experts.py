"""quantize_experts: the resulting experts and the messages."""

import copy

import pytest
import torch
from model_runs import experts_modules
from moe_blocks import ClampedMLP, GatedMLP, H, InferBlock, LoopBlock, MixtralMLP, TwoLayers, UngatedMLP
from tiny_models import VOCAB_SIZE, tiny_model
from torch import nn

import ktops
from ktops.nn import KTExperts

TOKENS = torch.arange(24).reshape(2, 12) % VOCAB_SIZE


def dense_copy(model: nn.Module) -> nn.Module:
    """Returns the model with the same experts, their weights decoded into Parameters."""
    dense = copy.deepcopy(model)
    for name, experts in model.named_modules():
        if isinstance(experts, KTExperts):
            weights = (ktops.dequantize(getattr(experts, kind)) for kind in ("gate_up_proj", "down_proj"))
            made = KTExperts.from_parameters(
                *map(nn.Parameter, weights), activation=experts.function.activation
            )
            dense.set_submodule(name, made)
    return dense


@pytest.mark.parametrize("swapped", [False, True])
def test_experts_become_weights_in_the_format(swapped):
    model = tiny_model("qwen3_moe")
    if swapped:
        ktops.swap_experts(model, save="recompute")
    original, names = copy.deepcopy(model), experts_modules(model)
    report = ktops.quantize_experts(model, "int4", group_size=32, method="mse")
    assert [layer.name for layer in report.layers] == names
    before = after = 0
    for name, layer in zip(names, report.layers, strict=True):
        experts, dense = model.get_submodule(name), original.get_submodule(name)
        assert isinstance(experts, KTExperts)
        assert experts.save == ("recompute" if swapped else "activations")
        for kind in ("gate_up", "down"):
            weight, expected = (getattr(module, f"{kind}_proj") for module in (experts, dense))
            assert torch.equal(
                weight.weight, ktops.quantize(expected, "int4", group_size=32, method="mse").weight
            )
            error = (ktops.dequantize(weight, torch.float32) - expected).norm() / expected.norm()
            assert getattr(layer, f"{kind}_error") == pytest.approx(error.item(), rel=1e-4)
            before, after = before + expected.nbytes, after + weight.nbytes
    assert (report.bytes_before, report.bytes_after) == (before, after)
    assert report.ratio == before / after > 6
    assert not any("gate_up_proj" in name for name, _ in model.named_parameters())
    assert str(report).startswith("experts: ") and "in int4, group 32 (f32: " in str(report)

    for name in names:
        model.get_submodule(name).compute = "bf16"
    with torch.no_grad():
        logits, expected = model(TOKENS).logits, dense_copy(model)(TOKENS).logits
    assert (logits - expected).norm() / expected.norm() < 1e-5
    assert (logits - original(TOKENS).logits).norm() / expected.norm() > 1e-3


def test_biases_and_training_mode_stay():
    experts = KTExperts(4, 64, 32, bias=True, activation="gelu", compute="bf16").eval()
    biases = experts.gate_up_proj_bias, experts.down_proj_bias
    model = nn.ModuleDict({"experts": experts})
    ktops.quantize_experts(model, "int8")
    made = model["experts"]
    assert made is not experts and not made.training
    assert (made.function.activation, made.compute) == ("gelu", "bf16")
    assert (made.gate_up_proj_bias, made.down_proj_bias) == biases


def refused(model: nn.Module, *arguments, **options) -> str:
    """Returns the error message; the model must be unchanged."""
    modules = list(model.modules())
    with pytest.raises(ValueError, match="quantize_experts: ") as error:
        ktops.quantize_experts(model, *arguments, **options)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    return str(error.value)


def test_nothing_changes_on_an_error():
    model = tiny_model("qwen3_moe")  # H 32, I 24
    first, second = experts_modules(model)
    assert "format must be one of bf16, fp16, fp32, int8" in refused(model, "int3")
    assert "method must be one of rtn, mse for format 'int4', got 'hqq'" in refused(
        model, "int4", method="hqq"
    )
    assert "group_size must be one of 0, any multiple of 32" in refused(model, "int4", group_size=7)
    message = refused(model, "mxfp4")
    assert (
        f"2 of 2 experts modules of Qwen3MoeForCausalLM cannot be quantized: {first}: down_proj: " in message
    )
    assert "needs rows of a multiple of 32 weights, got 24" in message and second in message
    with torch.no_grad():
        model.get_submodule(second).down_proj[3, 2, 1] = torch.inf
    assert f"1 of 2 experts modules of Qwen3MoeForCausalLM cannot be quantized: {second}: down_proj has" in (
        refused(model, "int8")
    )


def test_weights_beyond_a_scale_of_the_format_change_nothing():
    experts = nn.ModuleDict({"experts": KTExperts(2, 256, 256)})
    with torch.no_grad():
        experts["experts"].down_proj[1, 7, 5] = -1e8
    message = refused(experts, "q4_k")
    assert "experts: down_proj: quantize: format 'q4_k' needs finite weights, with group scales" in message
    assert "got weights from -1e+08 to" in message


@pytest.mark.parametrize("plain", [torch.bfloat16, torch.float16, torch.float32])
def test_experts_in_a_plain_format(plain):
    """Experts that KTConfig and load_experts read from a dense checkpoint are not quantized yet."""
    model = tiny_model("qwen3_moe")
    rounded = {
        name: (experts.gate_up_proj.to(plain).float(), experts.down_proj.to(plain).float())
        for name, experts in model.named_modules()
        if name in experts_modules(model)
    }
    ktops.quantize_experts(model, {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(plain, "fp32"))
    report = ktops.quantize_experts(model, "int8")
    assert len(report.layers) == len(rounded) and report.relative_error < 0.01
    for name, dense in rounded.items():
        experts = model.get_submodule(name)
        for weight, expected in zip((experts.gate_up_proj, experts.down_proj), dense, strict=True):
            assert torch.equal(weight.weight, ktops.quantize(expected, "int8").weight)
            assert weight.dtype == torch.float32
    model(TOKENS)


def test_only_one_weight_in_a_plain_format():
    dense = KTExperts(4, 64, 32)
    gate_up = ktops.quantize(dense.gate_up_proj.detach(), "fp32")
    model = nn.ModuleDict({"experts": KTExperts.from_parameters(gate_up, dense.down_proj)})
    ktops.quantize_experts(model, "int8")
    for kind in ("gate_up_proj", "down_proj"):
        expected = ktops.quantize(getattr(dense, kind).detach(), "int8")
        assert torch.equal(getattr(model["experts"], kind).weight, expected.weight)


LISTS = {
    "loop": (LoopBlock, {"expert": GatedMLP}),
    "mixtral with biases": (LoopBlock, {"expert": MixtralMLP, "bias": True}),
    "without gate": (LoopBlock, {"expert": UngatedMLP}),
    "moe_infer": (InferBlock, {}),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_experts(kind, swapped):
    """The block still iterates its experts, which compute with the decoded weights."""
    block, options = LISTS[kind]
    dense = TwoLayers(block, **options)
    model = copy.deepcopy(dense)
    if swapped:
        ktops.swap_experts(model)
    report = ktops.quantize_experts(model, "int8")
    assert [layer.name for layer in report.layers] == ["layers.0.experts", "layers.1.experts"]
    for layer, original in zip(model.layers, dense.layers, strict=True):
        stacked = layer.experts.stacked
        first, down = (ktops.dequantize(weight) for weight in stacked.layout.weights(stacked))
        for index, expert in enumerate(original.experts):
            names = [getattr(expert, name) for name in expert.names]
            parts = first[index].chunk(len(names) - 1)
            for linear, weight in zip(names, (*parts, down[index]), strict=True):
                assert 0 < (linear.weight - weight).norm() / weight.norm() < 0.02
                linear.weight.data = weight
    x = torch.randn(2, 9, H)
    for mode in (True, False):
        for each in (model, dense):
            each.train(mode)
        for layer in model.layers:
            layer.experts.stacked.compute = "bf16"
        expected = dense(x)
        assert (model(x) - expected).norm() / expected.norm() < 1e-5
    assert ("moe_infer" in vars(model.layers[0])) == (kind == "moe_infer")
    assert "its weights are already in format 'int8'" in refused(model, "int4")


def test_lora_on_a_list_of_experts(enabled):
    from peft import LoraConfig, get_peft_model

    model = TwoLayers(LoopBlock)
    ktops.quantize_experts(model, "int8")
    names = ktops.integrations.peft.expert_target_parameters(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=names))
    x = torch.randn(5, H)
    adapted(x).sum().backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 2 * 2
    assert all(bool(g.any()) for name, g in gradients.items() if "lora_B" in name)


def test_other_modules_are_refused():
    assert "without modules named `experts`" in refused(nn.Linear(2, 2), "int8")
    clamped = refused(TwoLayers(LoopBlock, expert=ClampedMLP), "int8")
    assert "layers.0.experts: it computes something else" in clamped
    model = nn.ModuleDict({"experts": KTExperts(4, 64, 32)})
    handle = model["experts"].register_forward_hook(lambda *_: None)
    assert "experts: it has hooks" in refused(model, "int8")
    handle.remove()
    ktops.quantize_experts(model, "int8")
    assert "its weights are already in format 'int8'" in refused(model, "int4")


def test_adapters_come_after_the_format(enabled):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation("ktops")
    assert "it has adapters: quantize first" in refused(get_peft_model(model, config), "int8")
