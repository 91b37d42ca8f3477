"""Experts of which the device has copies: it computes them, and the CPU the others."""

import copy
import re

import pytest
import torch
from model_runs import MODEL_BUDGET
from simulated.offloaded import (
    batch,
    logits,
    loss_and_gradients,
    model_on_cpu,
    on_cpu,
    require_close,
    with_adapters,
)
from torch import nn

import ktops
from ktops.compat import generate_gpu_experts_masks
from ktops.devices import accelerator
from ktops.integrations.gpu_experts import require_grouped_mm
from ktops.nn import experts
from ktops.nn.find import find_experts
from ktops.ops import moe_sft
from ktops.testing.budgets import model_budget, relative_error
from ktops.testing.inputs import moe_inputs
from ktops.testing.simulated_device import traffic

LAYERS, EXPERTS = 2, 6
MASK = torch.arange(LAYERS * EXPERTS).view(LAYERS, EXPERTS) % 3 == 1

pytestmark = pytest.mark.usefixtures("enabled", "single_thread")


def frozen(model):
    """Freezes the weights of experts, but not the norms that follow them."""
    for module in find_experts(model).values():
        for weight in module.parameters(recurse=False):
            weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("folder", ["qwen3_moe", "deepseek_v3", "gpt_oss", "muse_spark", "longcat_flash"])
@pytest.mark.parametrize("number", [1, EXPERTS])
def test_trains_the_rest_of_the_model(device, folder, number):
    model = frozen(model_on_cpu(folder))
    expected = loss_and_gradients(model, folder)
    report = ktops.offload_experts(model, device, num_gpu_experts=number)
    assert report.copies == number * len(report.layers) and f"with copies of {report.copies}, " in str(report)
    require_close(loss_and_gradients(model, folder), expected)


@pytest.mark.parametrize("folder", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("weight_format", [None, "int8"])
def test_trains_adapters(device, folder, weight_format):
    model = model_on_cpu(folder)
    if weight_format is not None:
        ktops.quantize_experts(model, weight_format, show_progress=False)
    model = with_adapters(model)
    expected = loss_and_gradients(model, folder)
    report = ktops.offload_experts(model, device, gpu_experts_mask=MASK)
    assert report.copies == MASK.sum() and all(".experts." in name for name in on_cpu(model))
    require_close(loss_and_gradients(model, folder), expected)
    with pytest.raises(NotImplementedError, match="cannot be merged") if weight_format else traffic():
        merged = copy.deepcopy(model).merge_and_unload()
        with model.disable_adapter():
            assert not torch.equal(logits(merged, folder), logits(model, folder))
        assert relative_error(logits(merged, folder), logits(model, folder)) < MODEL_BUDGET


@pytest.mark.parametrize("number", [0, 1])
def test_frozen_adapters(device, number):
    """The factors of experts stay in CPU memory with them; those of other layers do not."""
    model = with_adapters(model_on_cpu("qwen3_moe")).eval()
    expected = logits(model, "qwen3_moe")
    model = ktops.freeze_adapters(model)
    ktops.offload_experts(model, device, num_gpu_experts=number)
    names = on_cpu(model)
    assert any("lora_A" in name for name in names) and all(".experts." in name for name in names)
    assert relative_error(logits(model, "qwen3_moe"), expected) < MODEL_BUDGET


def test_the_cpu_computes_the_others(device, monkeypatch):
    """It gets ids outside [0, E) for what the device computes."""
    model = model_on_cpu("qwen3_moe").eval()
    ids = []
    with ktops.count_routes(model) as counts:
        logits(model, "qwen3_moe")
    ktops.offload_experts(model, device, gpu_experts_mask=list(MASK))

    def recorded(x, topk_ids, *args, **options):
        ids.append(topk_ids.cpu())
        return moe_sft(x, topk_ids, *args, **options)

    monkeypatch.setattr(experts, "moe_sft_pending", recorded)
    logits(model, "qwen3_moe")
    computed = torch.stack([top[top >= 0].bincount(minlength=EXPERTS) for top in ids])
    assert counts.sum() == LAYERS * 24 * 2 and torch.equal(computed, counts.masked_fill(MASK, 0))


def test_most_used(device):
    model = model_on_cpu("qwen3_moe")
    with ktops.count_routes(model) as counts:
        expected = logits(model, "qwen3_moe")
        logits(model, "qwen3_moe")
    mask = generate_gpu_experts_masks(counts, 4)
    assert counts[mask].min() >= counts[~mask].max() > 0
    assert ktops.offload_experts(model, device, gpu_experts_mask=mask).copies == 4
    assert relative_error(logits(model, "qwen3_moe"), expected) < MODEL_BUDGET


class Poisoned(torch.autograd.Function):
    """grouped_mm as on a GPU, where rows after the last group are undefined, in backward as well."""

    grouped_mm = staticmethod(torch.nn.functional.grouped_mm)

    @staticmethod
    def forward(ctx, rows, weight, ends):
        ctx.save_for_backward(rows, weight, ends)
        return Poisoned.poison(Poisoned.grouped_mm(rows, weight, offs=ends), ends)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, ends = ctx.saved_tensors
        with torch.enable_grad():
            rows, weight = rows.detach().requires_grad_(), weight.detach().requires_grad_()
            product = Poisoned.grouped_mm(rows, weight, offs=ends)
        in_groups = torch.arange(len(rows), device=rows.device)[:, None] < ends[-1]
        of_rows, of_weight = torch.autograd.grad(product, (rows, weight), grad.where(in_groups, 0))
        return Poisoned.poison(of_rows, ends), of_weight, None

    @staticmethod
    def poison(rows, ends):
        return rows.where(torch.arange(len(rows), device=rows.device)[:, None] < ends[-1], torch.nan)


@pytest.mark.parametrize(("folder", "prepare"), [("gpt_oss", with_adapters), ("muse_spark", frozen)])
def test_rows_of_other_experts_are_not_used(device, monkeypatch, folder, prepare):
    model = prepare(model_on_cpu(folder))
    expected = loss_and_gradients(model, folder)
    ktops.offload_experts(model, device, gpu_experts_mask=MASK)
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda rows, weight, offs: Poisoned.apply(rows, weight, offs)
    )
    require_close(loss_and_gradients(model, folder), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_layer(device, dtype, num_tokens):
    """With ids outside [0, E), and a norm that maps zeros to others."""
    norm = nn.LayerNorm(64, dtype=dtype)
    nn.init.normal_(norm.bias)
    layer = nn.Module()
    layer.experts = ktops.nn.KTExperts(4, 64, 32, bias=True, post_expert_norm=norm, dtype=dtype)
    given = moe_inputs(T=num_tokens, H=64, I=32, E=4, K=2, dtype=dtype, invalid_ids=num_tokens > 0)
    routes = [given[name] for name in ("hidden_states", "topk_ids", "topk_weights")]
    with torch.no_grad():
        with ktops.count_routes(layer) as counts:
            expected = layer.experts(routes[0], top_k_index=routes[1], top_k_weights=routes[2])
        known = routes[1][(routes[1] >= 0) & (routes[1] < 4)]
        assert torch.equal(counts[0], known.bincount(minlength=4))
        ktops.offload_experts(layer, device, 2)
        actual = layer.experts(*(tensor.to(device) for tensor in routes))
    assert actual.dtype == dtype and actual.shape == expected.shape
    if num_tokens:
        assert relative_error(actual.cpu(), expected) < model_budget(dtype, inner_size=64, num_operations=2)


def test_generates(device):
    model = model_on_cpu("deepseek_v3").eval()
    prompt = batch("deepseek_v3", torch.device("cpu"))["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    ktops.offload_experts(model, device, 2)
    prompt = prompt.to(device)
    actual = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(actual.cpu(), expected)


def test_copies_follow_the_model(device):
    """In moves, changes of dtype, loaded states and deep copies, not in state dicts."""
    model, other = frozen(model_on_cpu("qwen3_moe")), frozen(model_on_cpu("qwen3_moe"))
    names = model.state_dict().keys()
    ktops.offload_experts(model, device, 2)
    assert model.state_dict().keys() == names
    copies = model.model.layers[0].mlp.experts.on_device
    assert copies.down_proj.device == device and copies.down_proj.shape[0] == 2
    for parameter in other.parameters():
        parameter.data.mul_(1.25)
    model.load_state_dict(other.state_dict())
    expected = logits(other, "qwen3_moe")
    assert relative_error(logits(model, "qwen3_moe"), expected) < MODEL_BUDGET
    assert relative_error(logits(copy.deepcopy(model), "qwen3_moe"), expected) < MODEL_BUDGET
    assert model.to(torch.bfloat16).model.layers[0].mlp.experts.on_device.gate_up_proj.dtype == torch.bfloat16
    model.float().cpu()
    assert (
        relative_error(logits(model, "qwen3_moe"), logits(other.bfloat16().float(), "qwen3_moe"))
        < MODEL_BUDGET
    )
    assert ktops.offload_experts(model, device).copies == 0
    assert not hasattr(model.model.layers[0].mlp.experts, "on_device")


def test_trainable_experts_are_an_error(device):
    model = model_on_cpu("qwen3_moe")
    ktops.offload_experts(model, device, 1)
    with pytest.raises(RuntimeError, match=r"experts with copies on simgpu:0 .* cannot be trained"):
        model(**batch("qwen3_moe", device))
    assert logits(frozen(model), "qwen3_moe").isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_gpu_experts": EXPERTS + 1},
            "num_gpu_experts must be from 0 to 6, the experts of a layer, got 7",
        ),
        ({"num_gpu_experts": -1}, "num_gpu_experts must be from 0 to 6, the experts of a layer, got -1"),
        (
            {"gpu_experts_mask": MASK[:1]},
            "gpu_experts_mask must have a row for each of 2 layers with experts, got 1",
        ),
        (
            {"gpu_experts_mask": MASK[:, 1:]},
            "must be bool [6] for model.layers.0.mlp.experts, got torch.bool [5]",
        ),
        (
            {"gpu_experts_mask": MASK.int()},
            "must be bool [6] for model.layers.0.mlp.experts, got torch.int32 [6]",
        ),
        (
            {"gpu_experts_mask": MASK, "num_gpu_experts": 1},
            "num_gpu_experts must be 0 with gpu_experts_mask, got 1",
        ),
        ({"gpu_experts_mask": [[True, False]] * 2}, "must be bool [6] for model.layers.0.mlp.experts, got"),
        ({"num_gpu_experts": 2.5}, "num_gpu_experts must be from 0 to 6, the experts of a layer, got 2.5"),
        ({"num_gpu_experts": None}, "num_gpu_experts must be from 0 to 6, the experts of a layer, got None"),
    ],
)
def test_wrong_choice(device, options, message):
    model = model_on_cpu("qwen3_moe")
    with pytest.raises(ValueError, match=re.escape("offload_experts: ") + ".*" + re.escape(message)):
        ktops.offload_experts(model, device, **options)
    assert model.device.type == "cpu"


def test_experts_that_cannot_be_split(device):
    with pytest.raises(
        ValueError, match=r"num_gpu_experts must be 0, because ktops cannot split .*, a DbrxExp"
    ):
        ktops.offload_experts(model_on_cpu("dbrx"), device, 1)
    with (
        pytest.raises(ValueError, match="count_routes: all layers must have"),
        ktops.count_routes(model_on_cpu("dbrx")),
    ):
        pass


def test_an_old_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"must be 0 on Tesla T4, .* needs compute capability 8\.0"):
        require_grouped_mm(torch.device("cuda"))


def test_no_room_for_copies(device, monkeypatch):
    model = model_on_cpu("qwen3_moe")
    needed = ktops.offload_experts(copy.deepcopy(model), device, 1)
    assert needed.bytes_of_copies == LAYERS * 3 * 24 * 32 * 4
    monkeypatch.setattr(accelerator, "free_memory", lambda device: needed.bytes_on_device + 1)
    with pytest.raises(torch.OutOfMemoryError, match="without its experts, with copies of 2 of them, needs"):
        ktops.offload_experts(model, device, 1)
    ktops.offload_experts(model, device)
