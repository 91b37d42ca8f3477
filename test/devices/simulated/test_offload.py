"""ktops.offload_experts: models on a device, their experts and the adapters on them in CPU memory."""

import copy
import pickle

import pytest
import torch
import vision_models
from model_runs import MODEL_BUDGET
from moe_blocks import InferBlock, LoopBlock
from peft import LoraConfig, inject_adapter_in_model
from simulated.offloaded import batch, loss_and_gradients, model_on_cpu, on_cpu, require_close, with_adapters
from torch import nn

import ktops
from ktops.devices import accelerator
from ktops.testing.budgets import relative_error
from ktops.testing.simulated_device import traffic

FOLDERS = ["qwen3_moe", "deepseek_v3", "gpt_oss"]
LAYERS, TOKENS, HIDDEN, TOP_K = 2, 2 * 12, 32, 2

pytestmark = pytest.mark.usefixtures("enabled", "single_thread")


def experts_names(model: nn.Module) -> set[str]:
    """Returns the names of the tensors of routed experts, and of adapters on them."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name for name in tensors if ".experts." in name}


@pytest.mark.parametrize("folder", FOLDERS)
def test_trains_adapters_as_on_the_cpu(device, folder):
    model = with_adapters(model_on_cpu(folder))
    expected = loss_and_gradients(model, folder)
    report = ktops.offload_experts(model, device)
    assert model.device == device and on_cpu(model) == experts_names(model)
    assert len(report.layers) == LAYERS and "of 2 layers" in str(report)
    assert report.bytes_on_cpu == sum(model.get_parameter(name).nbytes for name in on_cpu(model))
    inputs = batch(folder, device)
    moved = TOKENS * HIDDEN * 4
    routes = TOKENS * TOP_K * 4
    with traffic() as forward:
        loss = model(**inputs).loss
    with traffic() as backward:
        loss.backward()
    assert forward["down"] == LAYERS * (moved + routes + TOKENS * TOP_K * 8)
    assert forward["up"] == backward["down"] == LAYERS * moved
    assert backward["up"] == LAYERS * (moved + routes)
    assert (forward["copies_down"], forward["copies_up"]) == (3 * LAYERS, LAYERS)
    assert (backward["copies_down"], backward["copies_up"]) == (LAYERS, 2 * LAYERS)
    model.zero_grad(set_to_none=True)
    require_close(loss_and_gradients(model, folder), expected)


OTHERS = ["deepseek_v2", "dbrx", "jetmoe", "llama4", "muse_spark", "switch_transformers"]


@pytest.mark.parametrize("folder", [*FOLDERS, *OTHERS])
def test_trains_all_weights_as_on_the_cpu(device, folder):
    model = model_on_cpu(folder)
    expected = loss_and_gradients(model, folder)
    report = ktops.offload_experts(model, device)
    assert report.bytes_on_cpu == sum(model.get_parameter(name).nbytes for name in on_cpu(model)) > 0
    require_close(loss_and_gradients(model, folder), expected)


@pytest.mark.parametrize("folder", FOLDERS)
def test_generates_with_a_cache_as_on_the_cpu(device, folder):
    model = with_adapters(model_on_cpu(folder)).eval()
    prompt = batch(folder, torch.device("cpu"))["input_ids"]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(input_ids=prompt, use_cache=True, **options)
    ktops.offload_experts(model, device)
    options["attention_mask"] = options["attention_mask"].to(device)
    actual = model.generate(input_ids=prompt.to(device), use_cache=True, **options)
    assert actual.device == device and torch.equal(actual.cpu(), expected)


def test_adapters_may_be_added_afterward(device):
    folder = "qwen3_moe"
    expected = loss_and_gradients(with_adapters(model_on_cpu(folder)), folder)
    model = model_on_cpu(folder)
    ktops.offload_experts(model, device)
    model = with_adapters(model)
    assert on_cpu(model) == experts_names(model)
    model.to(device)
    assert ktops.offload_experts(model, device).device == device
    assert on_cpu(model) == experts_names(model)
    require_close(loss_and_gradients(model, folder), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model.cpu()))])
def test_experts_stay_when_the_model_moves(device, copied):
    model = with_adapters(model_on_cpu("qwen3_moe", tie_word_embeddings=True))
    ktops.offload_experts(model, device)
    model = copied(model)
    model.to(device, torch.bfloat16)
    assert on_cpu(model) == experts_names(model)
    assert {p.dtype for name, p in model.named_parameters()} == {torch.bfloat16}
    model.to(device).float()
    assert on_cpu(model) == experts_names(model) and model.dtype == torch.float32
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.cpu()
    assert len(on_cpu(model)) == len({**dict(model.named_parameters()), **dict(model.named_buffers())})


@torch.no_grad()
def test_vision_model(device):
    model = vision_models.vision_model("qwen3_vl_moe").eval()
    model.set_experts_implementation("ktops")
    inputs = vision_models.image_batch(model)
    expected = model(**inputs).logits
    ktops.offload_experts(model, device)
    assert on_cpu(model) == experts_names(model)
    actual = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
    assert relative_error(actual.cpu(), expected) < MODEL_BUDGET


@pytest.mark.parametrize("block", [LoopBlock, InferBlock])
@pytest.mark.parametrize("kind", ["list", "adapted list", "int8"])
def test_blocks_that_iterate(device, block, kind):
    """A block runs one op per expert; experts with adapters run in CPU memory without the op."""
    torch.manual_seed(0)
    model = nn.Sequential(block())
    x = torch.randn(7, 32)
    if kind == "int8":
        ktops.quantize_experts(model, "int8", show_progress=False)
    else:
        ktops.swap_experts(model)
    expected = model(x).detach(), model.eval()(x).detach()
    ktops.offload_experts(model.train(), device)
    if kind == "adapted list":
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0.experts.1.up_proj"]), model)
        model.to(device)
    actual = model(x.to(device)).detach(), model.eval()(x.to(device)).detach()
    assert all(".experts." in name or ".stacked." in name for name in on_cpu(model)) and on_cpu(model)
    for value, wanted in zip(actual, expected, strict=True):
        assert value.device == device and relative_error(value.cpu(), wanted) < MODEL_BUDGET


def test_experts_in_a_format(device):
    folder = "gpt_oss"
    model = model_on_cpu(folder)
    ktops.quantize_experts(model, "int8", show_progress=False)
    model = with_adapters(model)
    expected = loss_and_gradients(model, folder)
    ktops.offload_experts(model, device)
    assert on_cpu(model) == experts_names(model)
    require_close(loss_and_gradients(model, folder), expected)


def test_replaced_experts_stay(device):
    model = model_on_cpu("gpt_oss")
    ktops.offload_experts(model, device)
    ktops.swap_experts(model)
    assert on_cpu(model.to(device)) == experts_names(model)
    ktops.quantize_experts(model, "int8", show_progress=False)
    assert on_cpu(model.to(device)) == experts_names(model)


def test_merge_and_state_dict(device):
    model = with_adapters(model_on_cpu("qwen3_moe"))
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    ktops.offload_experts(model, device)
    merged = model.merge_and_unload()
    assert on_cpu(merged) == experts_names(merged)
    state = merged.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name].cpu(), value) for name, value in expected.items())


def test_saved_model(device, tmp_path):
    model = model_on_cpu("qwen3_moe", tie_word_embeddings=True)
    expected = loss_and_gradients(model, "qwen3_moe")
    ktops.offload_experts(model, device)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path, experts_implementation="ktops", attn_implementation="eager"
    )
    assert len(on_cpu(loaded)) > len(experts_names(loaded))
    require_close(loss_and_gradients(loaded.train(), "qwen3_moe"), expected)


def test_no_room(device, monkeypatch):
    model = model_on_cpu("qwen3_moe")
    monkeypatch.setattr(accelerator, "free_memory", lambda device: 40_000)
    message = (
        "offload_experts: Qwen3MoeForCausalLM without its experts needs 50.5 KiB on simgpu:0, which has "
        "39.1 KiB free"
    )
    with pytest.raises(torch.OutOfMemoryError, match=message):
        ktops.offload_experts(model, device)
    assert model.device.type == "cpu"
    assert len(on_cpu(model.to(device))) == 0


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("cuda", "device must be an accelerator of this machine, of which torch .* finds simgpu, got 'cuda'"),
        ("cpu", "device must be an accelerator of this machine"),
        ("simgpu:1", "device must be simgpu:0 to simgpu:0, got simgpu:1"),
        ("gpu", "device must be an accelerator such as cuda, got 'gpu'"),
        (None, "device must be an accelerator such as cuda, got None"),
    ],
)
def test_no_such_device(named, message):
    model = model_on_cpu("qwen3_moe")
    with pytest.raises(ValueError, match=f"offload_experts: {message}"):
        ktops.offload_experts(model, named)


def test_no_experts_that_ktops_runs(device):
    model = model_on_cpu("qwen3_moe")
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"runs none .* has experts_implementation='eager'"):
        ktops.offload_experts(model, device)
    with pytest.raises(ValueError, match="offload_experts: model must have Mixture-of-Experts layers"):
        ktops.offload_experts(nn.Linear(2, 2), device)
    assert model.device.type == "cpu"


def test_a_model_that_was_moved_whole(device):
    """Its experts run there, as transformers' own; the warning and the error say what would leave them."""
    model = model_on_cpu("qwen3_moe").to(device)
    with pytest.warns(UserWarning, match=r"its weights are on simgpu, not in CPU memory, .* ktops.offload"):
        model(**batch("qwen3_moe", device))
    with pytest.raises(ValueError, match=r"runs none .* weights are on simgpu, .* by ktops.offload"):
        ktops.offload_experts(model, device)


def test_experts_that_ktops_does_not_run_move(device):
    model = model_on_cpu("qwen3_moe")
    experts = model.model.layers[1].mlp.experts
    experts.act_fn = nn.Mish()
    with pytest.warns(UserWarning, match="moves the experts of 1 layers to simgpu:0, .*no activation Mish"):
        ktops.offload_experts(model, device)
    assert experts.down_proj.device == device and model.model.layers[0].mlp.experts.down_proj.is_cpu


def test_models_that_cannot_be_placed(device):
    model = model_on_cpu("qwen3_moe")
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(ValueError, match="accelerate has put it on 0, cpu"):
        ktops.offload_experts(model, device)
    with torch.device("meta"):
        model = model_on_cpu("qwen3_moe")
    with pytest.raises(ValueError, match=r"must be loaded, but model\.embed_tokens\.weight is on meta"):
        ktops.offload_experts(model, device)
