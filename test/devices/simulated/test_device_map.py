"""from_pretrained(..., device_map=...): experts in CPU memory, everything else on the device."""

import every_model
import pytest
import torch
import transformers
from model_runs import MODEL_BUDGET
from simulated.offloaded import batch, logits, loss_and_gradients, on_cpu, require_close, with_adapters
from test_quantizer import write_fp8
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

import ktops
from ktops.devices import accelerator
from ktops.testing.budgets import gradient_budget, relative_error
from ktops.testing.simulated_device import traffic

LAYERS, TOKENS, HIDDEN = 2, 2 * 12, 32

pytestmark = pytest.mark.usefixtures("enabled", "single_thread")
one = pytest.mark.parametrize("folder", ["qwen3_moe"], indirect=True)


@pytest.fixture(params=["qwen3_moe", "deepseek_v3", "gpt_oss"])
def folder(request):
    return request.param


@pytest.fixture
def saved(folder, tmp_path):
    every_model.tiny_model(folder).save_pretrained(tmp_path)
    return tmp_path


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(
        path, experts_implementation="ktops", attn_implementation="eager", **options
    )


def layer_map(device) -> dict:
    """Returns a device map with an entry per layer, as people write them, and the experts on the CPU."""
    layers = {f"model.layers.{i}": str(device) for i in range(2)}
    parts = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), str(device))
    return parts | layers | {f"model.layers.{i}.mlp.experts": "cpu" for i in range(2)}


@pytest.mark.parametrize(
    "given", [str, lambda device: {"": device}, layer_map], ids=["name", "all", "layers"]
)
def test_loads_as_on_the_cpu(device, saved, folder, given):
    expected = load(saved, quantization_config=ktops.KTConfig())
    with traffic() as loading:
        model = load(saved, device_map=given(device), quantization_config=ktops.KTConfig())
    staying = on_cpu(model)
    assert model.device == device and staying == {name for name in on_cpu(expected) if ".experts." in name}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_device = sum(tensor.nbytes for name, tensor in tensors.items() if name not in staying)
    assert loading["down"] == 0 and loading["up"] <= 1.01 * on_device
    assert not hasattr(model, "hf_device_map")
    wanted = logits(expected, folder)
    assert relative_error(logits(model, folder), wanted) < gradient_budget(torch.float32, inner_size=64)
    assert ktops.offload_experts(model, device, 1).copies == LAYERS and on_cpu(model) == staying
    assert relative_error(logits(model, folder), wanted) < MODEL_BUDGET


def test_fp8_outside_the_experts(device, tmp_path):
    """The codes go to the device and are decoded there."""
    config = tiny_config("qwen3_moe", hidden_size=128, moe_intermediate_size=128, head_dim=32)
    write_fp8(transformers.Qwen3MoeForCausalLM(config).eval(), tmp_path)
    options = {"quantization_config": ktops.KTConfig(), "dtype": torch.float32}
    expected = load(tmp_path, **options)
    with traffic() as loading:
        model = load(tmp_path, device_map=str(device), **options)
    assert loading["up"] < sum(parameter.nbytes for parameter in model.parameters()) / 2
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        actual, wanted = model(tokens.to(device)).logits, expected(tokens).logits
    assert relative_error(actual.cpu(), wanted) < MODEL_BUDGET


@one
def test_layers_that_accelerate_dispatches(device, saved, folder):
    """As with several devices: it moves the weights of a layer for each forward, but not its experts."""
    device_map = layer_map(device) | {"model.layers.1": "cpu"}
    model = load(saved, device_map=device_map, quantization_config=ktops.KTConfig())
    assert set(model.hf_device_map.values()) == {str(device), "cpu"}
    experts = [name for name, tensor in model.named_buffers() if tensor.device.type == "cpu"]
    assert len(experts) == 4 and model.model.layers[1].self_attn.q_proj.weight.is_meta
    with traffic() as moved:
        actual = logits(model, folder)
    wanted = logits(load(saved), folder)
    assert relative_error(actual, wanted) < gradient_budget(torch.float32, inner_size=64)
    layer = sum(p.nbytes for name, p in model.model.layers[0].named_parameters() if ".experts." not in name)
    assert moved["up"] < layer + LAYERS * 4 * TOKENS * HIDDEN + 1000


def test_trains_generates_and_saves(device, saved, folder, tmp_path):
    model = load(saved, device_map=str(device), quantization_config=ktops.KTConfig("int8"))
    prompt = batch(folder, device)["input_ids"]
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3)
    assert generated.shape == (2, 15) and generated.device == device
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", device_map=str(device))
    assert on_cpu(again) == on_cpu(model)
    models = [with_adapters(each.train()) for each in (model, again)]
    expected, actual = (loss_and_gradients(each, folder) for each in models)
    assert actual.keys() == expected.keys() and len(actual) > 4
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_to_does_not_move_experts(device, saved, folder):
    model = with_adapters(load(saved, quantization_config=ktops.KTConfig()).train())
    expected = loss_and_gradients(model, folder)
    model.to(device)
    assert all(".experts." in name for name in on_cpu(model)) and on_cpu(model)
    require_close(loss_and_gradients(model, folder), expected)


@one
def test_without_a_config_is_an_error_before_loading(device, saved):
    message = (
        r"device_map must not name simgpu:0: .*quantization_config=ktops\.KTConfig\(\)\. Or load without "
        r"device_map, and call ktops\.offload_experts\(model, 'simgpu:0'\)"
    )
    with traffic() as loading, pytest.raises(ValueError, match=message):
        load(saved, device_map=str(device))
    assert not loading
    assert load(saved, device_map="cpu").device.type == "cpu"
    ktops.offload_experts(load(saved), device)


@one
def test_no_room(device, saved, monkeypatch):
    monkeypatch.setattr(accelerator, "free_memory", lambda device: 40_000)
    message = "from_pretrained: .* without its experts needs .* KiB on simgpu:0, which has 39.1 KiB free"
    with traffic() as loading, pytest.raises(torch.OutOfMemoryError, match=message):
        load(saved, device_map=str(device), quantization_config=ktops.KTConfig())
    assert not loading


@one
def test_default_device(device, saved):
    with device:
        model = load(saved, quantization_config=ktops.KTConfig("int8"))
    assert model.device == device and all(".experts." in name for name in on_cpu(model))
