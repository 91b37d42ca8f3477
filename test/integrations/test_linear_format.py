"""quantize_linear: which layers become int8, and what adapters do on them."""

import copy
from collections.abc import Sequence

import peft
import pytest
import torch
from tiny_models import tiny_model
from torch import nn

import ktops
from ktops.integrations import data_parallel
from ktops.nn import Int8Linear
from ktops.testing.budgets import relative_error

IDS = torch.arange(3, 15).view(1, -1)


def names(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, Int8Linear)}


EXPECTED = {
    "qwen3_moe": {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"},
    "qwen2_moe": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "lm_head"},
    "deepseek_v2": {
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "o_proj",
        "gate_proj",
        "up_proj",
        "lm_head",
    },
}


@pytest.mark.parametrize("architecture", sorted(EXPECTED))
def test_layers_and_logits(architecture):
    model = tiny_model(architecture).eval()
    with torch.no_grad():
        before = model(IDS).logits
        report = ktops.quantize_linear(model)
        after = model(IDS).logits
    assert EXPECTED[architecture] <= names(model)
    assert not names(model) & {"gate", "router", "shared_expert_gate", "kv_b_proj"}
    assert len(report.layers) == sum(isinstance(module, Int8Linear) for module in model.modules())
    assert report.bytes_after < report.bytes_before / 2
    assert 0 < relative_error(after, before.double()) < 0.1
    assert ktops.quantize_linear(model).layers == ()


def test_generates_the_same_with_a_cache():
    model = tiny_model("qwen3_moe").eval()
    ktops.quantize_linear(model)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))


def test_a_head_that_shares_the_embeddings():
    model = tiny_model("qwen3_moe", tie_word_embeddings=True).eval()
    ktops.quantize_linear(model)
    assert isinstance(model.lm_head, Int8Linear)
    assert model.get_input_embeddings().weight.dtype == torch.float32
    model(IDS)


def adapted(model: nn.Module, targets: Sequence[str] = ("q_proj", "v_proj")) -> peft.PeftModel:
    config = peft.LoraConfig(r=4, target_modules=[*targets], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def gradients(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("first", ["adapters", "quantize"])
def test_adapters_are_trained(first):
    """Against a model that holds the same weights dense."""
    model = tiny_model("qwen3_moe").eval()
    torch.manual_seed(1)
    if first == "adapters":
        model = adapted(model)
        ktops.quantize_linear(model)
    else:
        ktops.quantize_linear(model)
        model = adapted(model)
    assert all(type(m) is not Int8Linear for n, m in model.named_modules() if "lora_" in n)
    actual = gradients(model)
    assert actual and all("lora_" in name for name in actual)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Int8Linear):
                dense = nn.Linear(child.in_features, child.out_features, bias=False)
                dense.weight = nn.Parameter(child.dequantize(), requires_grad=False)
                setattr(parent, name, dense)
    expected = gradients(model)
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        assert relative_error(grad, expected[name].double()) < 1e-4, name


def test_adapters_do_not_change_which_layers_are_converted():
    """PEFT moves a layer with an adapter into a child with another name."""
    plain = tiny_model("deepseek_v2")
    adapters = adapted(tiny_model("deepseek_v2"), ["kv_b_proj", "o_proj", "lm_head"])
    expected = ktops.quantize_linear(plain).layers
    actual = ktops.quantize_linear(adapters).layers
    prefix = "base_model.model."
    layers = [name.removeprefix(prefix).removesuffix(".base_layer") for name in actual]
    assert sorted(layers) == sorted(expected)
    assert any(name.endswith("o_proj.base_layer") for name in actual)


def test_adapters_cannot_be_merged():
    model = tiny_model("qwen3_moe")
    ktops.enable()
    ktops.quantize_linear(model)
    model = adapted(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=r"ktops: LoRA on q_proj in int8 cannot be merged"):
            merge()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_errors_change_nothing():
    model = tiny_model("qwen3_moe")
    with pytest.raises(ValueError, match="quantize_linear: linear_format must be one of int8, got 'int3'"):
        ktops.quantize_linear(model, "int3")
    model.lm_head.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="quantize_linear: lm_head: Int8Linear: weight must be finite"):
        ktops.quantize_linear(model)
    assert not names(model)


@pytest.mark.parametrize("copied", [False, True])
def test_models_are_not_saved(tmp_path, copied):
    model = tiny_model("qwen3_moe")
    ktops.quantize_experts(model, "int8", show_progress=False)
    ktops.quantize_linear(model)
    model = copy.deepcopy(model) if copied else model
    for part in (model, model.model):
        with pytest.raises(ValueError, match=r"Save the model before .*, or save its adapters"):
            part.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_models_without_such_layers_are_saved(tmp_path):
    model = tiny_model("qwen3_moe", hidden_size=24, num_attention_heads=1, num_key_value_heads=1, head_dim=24)
    assert ktops.quantize_linear(model).layers == ()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("library", ["peft", "transformers"])
@pytest.mark.parametrize("first", ["adapters", "quantize"])
def test_adapters_are_saved(tmp_path, monkeypatch, library, first):
    if library == "transformers":  # whose adapters ask for a PEFT that may not be released yet
        monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model, other = tiny_model("qwen3_moe").eval(), tiny_model("qwen3_moe").eval()
    if first == "quantize":
        ktops.quantize_linear(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    if library == "peft":
        model = peft.get_peft_model(model, config)
    else:
        model.add_adapter(config)
    if first == "adapters":
        ktops.quantize_linear(model)
    model.save_pretrained(tmp_path)
    ktops.quantize_linear(other)
    with torch.no_grad():
        before = other(IDS).logits
        if library == "peft":
            other = peft.PeftModel.from_pretrained(other, tmp_path)
        else:
            other.load_adapter(tmp_path)
        after = other(IDS).logits
        assert not torch.equal(after, before)
        assert torch.equal(after, model(IDS).logits)


def test_data_parallel_leaves_them_alone(monkeypatch, request):
    """DistributedDataParallel would send their weights to all processes before every forward."""
    request.addfinalizer(data_parallel.disable)
    model = tiny_model("qwen3_moe")
    ktops.quantize_linear(model)
    monkeypatch.setitem(data_parallel._replaced.original, "__init__", lambda *arguments: None)
    nn.parallel.DistributedDataParallel(model)
    buffers = {name for name, _ in model.named_buffers() if name.endswith(("qweight", "scale"))}
    assert buffers and set(model._ddp_params_and_buffers_to_ignore) == buffers
