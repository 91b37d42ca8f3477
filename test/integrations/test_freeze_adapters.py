"""freeze_adapters: models compute the same without PEFT's modules, or keep those that are not plain LoRA."""

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from every_model import tiny_batch as batch_of
from every_model_runs import through_ktops, with_adapters
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_models import adapted, logits, randomize
from tiny_models import ARCHITECTURES, tiny_model
from torch import nn

import ktops
from ktops.cli.finetune.measure import count_weights
from ktops.integrations.lora_targets import lora_targets
from ktops.integrations.transformers.attention import use_attention
from ktops.nn import KTExperts
from ktops.nn.frozen_lora import FROZEN_LORA, FrozenLoraLinear
from ktops.testing.budgets import forward_budget, relative_error
from ktops.testing.counts import counted

pytestmark = pytest.mark.usefixtures("enabled")

IDS = torch.arange(3, 27).view(2, 12)


def experts_of(model: nn.Module) -> list[KTExperts]:
    return [module for module in model.modules() if isinstance(module, KTExperts)]


def wrappers(model: nn.Module) -> list[str]:
    """Returns the names of the layers that are still PEFT's."""
    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


@torch.no_grad()
def steps(model: nn.Module) -> torch.Tensor:
    """Returns the logits of a prompt and of two steps after it."""
    output = model(IDS[:, :10], use_cache=True)
    found = [output.logits]
    for end in (11, 12):
        output = model(IDS[:, end - 1 : end], past_key_values=output.past_key_values)
        found.append(output.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_bits(architecture):
    model = adapted(architecture, dtype=torch.bfloat16).eval()
    expected = steps(model)
    with model.disable_adapter():
        assert relative_error(steps(model), expected.double()) > 0.05
    layers, weights = len(wrappers(model)), count_weights(model)
    frozen = ktops.freeze_adapters(model)
    assert count_weights(frozen) == weights
    assert layers and not wrappers(frozen)
    assert all(FROZEN_LORA in experts._modules for experts in experts_of(frozen))
    assert torch.equal(steps(frozen), expected)
    assert not any("lora" in name for name, _ in frozen.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latent_attention(dtype):
    """With the adapter on kv_b_proj, latents are still not expanded in a step."""
    model = adapted("deepseek_v3", dtype=dtype, lora={"target_modules": ["kv_b_proj", "o_proj"]}).eval()
    use_attention(model.get_base_model())
    with counted() as counts:
        expected = steps(model)
    frozen = ktops.freeze_adapters(model)
    assert not wrappers(frozen)
    with counted() as counts_of_frozen:
        actual = steps(frozen)
    name = "aten::scaled_dot_product_attention"
    assert counts_of_frozen.operators[name] == counts.operators[name]
    assert torch.equal(actual, expected)


FOLDERS = ["gpt_oss", "openai_privacy_filter", "aria", "nemotron_h", "muse_spark", "llama4"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_other_layouts(folder):
    """Transposed and interleaved weights, experts without a gate, or followed by a norm."""
    model = through_ktops(folder, with_adapters(folder, seed=3).eval())
    batch = batch_of(folder)
    with torch.no_grad():
        expected = model(**batch).logits
        frozen = ktops.freeze_adapters(model)
        assert not wrappers(frozen) and experts_of(frozen)
        assert torch.equal(frozen(**batch).logits, expected)


def test_experts_in_a_format_pass_only_tokens():
    model = tiny_model("qwen3_moe", hidden_size=64, moe_intermediate_size=32, dtype=torch.bfloat16)
    ktops.quantize_experts(model, "int4", group_size=32, show_progress=False)
    ktops.quantize_linear(model)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], target_parameters=targets)
    model = peft.get_peft_model(model, config).eval()
    randomize(model)
    expected = steps(model)
    frozen = ktops.freeze_adapters(model)
    assert torch.equal(steps(frozen), expected)
    with counted() as counts:
        steps(frozen)
    assert {name for name in counts.operators if name.startswith("kt::moe")} == {"kt::moe_fwd_prepared"}
    down = experts_of(frozen)[0].get_submodule(FROZEN_LORA).get_buffer("down_lora_B")
    assert down.mT.is_contiguous() and down.shape == (8, 64, 4)


@pytest.mark.parametrize("linear_format", [None, "int8"])
def test_parameters_of_linear_layers(linear_format):
    """PEFT adapts some linear layers by their weights."""
    model = tiny_model("deepseek_v2", experts_implementation="ktops", hidden_size=64).eval()
    modules, parameters = lora_targets(model, "all")
    weights = [name for name in parameters if name.endswith(".weight")]
    config = peft.LoraConfig(r=4, target_modules=modules, target_parameters=parameters)
    model = peft.get_peft_model(model, config).eval()
    randomize(model)
    expected = logits(model)
    frozen = ktops.freeze_adapters(model)
    assert weights and not wrappers(frozen)
    if linear_format is not None:
        ktops.quantize_linear(frozen, linear_format)
    budget = 0.1 if linear_format else forward_budget(torch.float32)
    assert relative_error(logits(frozen), expected.double()) < budget


def test_two_adapters_at_once():
    """Experts add up their factors. Linear layers stay PEFT's."""
    model = adapted("qwen3_moe").eval()
    model.add_adapter("second", model.peft_config["default"])
    randomize(model, seed=2)
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    frozen = ktops.freeze_adapters(model)
    assert wrappers(frozen) and all(name.endswith("o_proj") for name in wrappers(frozen))
    assert torch.equal(logits(frozen), expected)


def merge(model: peft.PeftModel) -> None:
    model.merge_adapter()


def disable(model: peft.PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def add_hooks(model: peft.PeftModel) -> None:
    for name in wrappers(model):
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize("change", [merge, disable, add_hooks])
def test_what_is_not_an_active_adapter_stays(change):
    model = adapted("qwen3_moe").eval()
    change(model)
    expected, before = logits(model), len(wrappers(model))
    frozen = ktops.freeze_adapters(model)
    assert len(wrappers(frozen)) == before
    assert torch.equal(logits(frozen), expected)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_adapters_stay(options):
    lora = {"target_modules": ["q_proj"], "target_parameters": None, **options}
    model = adapted("qwen3_moe", lora=lora).eval()
    expected = logits(model)
    frozen = ktops.freeze_adapters(model)
    assert len(wrappers(frozen)) == frozen.config.num_hidden_layers
    assert torch.equal(logits(frozen), expected)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def quantized(model: nn.Module) -> nn.Module:
    before = count_weights(model)
    ktops.quantize_linear(model)
    assert count_weights(model) == before
    assert all(isinstance(m.base_layer, ktops.nn.Int8Linear) for m in frozen_linears(model))
    return model


def in_float64(model: nn.Module) -> nn.Module:
    return model.double()


def frozen_linears(model: nn.Module) -> list[FrozenLoraLinear]:
    return [module for module in model.modules() if isinstance(module, FrozenLoraLinear)]


@pytest.mark.parametrize(("change", "budget"), [(copied, 0), (quantized, 0.1), (in_float64, 1e-5)])
def test_changes_of_the_model(change: Callable[[nn.Module], nn.Module], budget: float):
    model = ktops.freeze_adapters(adapted("qwen3_moe").eval())
    expected = logits(model)
    assert frozen_linears(model)
    assert relative_error(logits(change(model)), expected.double()) <= budget


def test_another_adapter_is_an_error():
    model = ktops.freeze_adapters(adapted("qwen3_moe").eval())
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    model = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="KTExperts: experts with a frozen adapter cannot have another one"):
        logits(model)


def test_experts_are_not_replaced_without_their_adapter():
    model = ktops.freeze_adapters(adapted("qwen3_moe").eval())
    expected = logits(model)
    with pytest.raises(ValueError, match="they have a frozen adapter"):
        ktops.quantize_experts(model, "int8", show_progress=False)
    assert ktops.swap_experts(model) == []
    assert torch.equal(logits(model), expected)


def test_compiled(compiling):
    model = ktops.freeze_adapters(adapted("qwen3_moe").eval())
    block = model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), block(x))


def test_inputs_have_gradients():
    model = adapted("qwen3_moe").eval()
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    (expected,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits.sum(), embeddings)
    frozen = ktops.freeze_adapters(model)
    (actual,) = torch.autograd.grad(frozen(inputs_embeds=embeddings).logits.sum(), embeddings)
    assert relative_error(actual, expected.double()) < forward_budget(torch.float32)
