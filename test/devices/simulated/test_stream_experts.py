"""ktops.stream_experts: from how many tokens experts are computed on the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from simulated.conftest import TOKENS, Calls, inputs, on_device
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs

import ktops
from ktops.nn import KTExpertList, KTExperts, KTExpertSequence
from ktops.testing.budgets import forward_budget, relative_error
from ktops.testing.inputs import floating, require_grad

pytestmark = pytest.mark.usefixtures("single_thread")

E, H, I, K = 4, 64, 32, 2  # noqa: E741


def tokens(count: int, *shape: int) -> tuple[torch.Tensor, ...]:
    given = inputs(T=count)
    x, ids, weights = (given[name] for name in TOKENS)
    return (x.view(*shape, H) if shape else x), ids, weights


def run(module: nn.Module, given: tuple[torch.Tensor, ...], device, **lora) -> list[str]:
    """Compares a module with the CPU, with tokens on the device; returns the operators that ran there."""
    expected = module(*given, **lora)
    with Calls() as calls:
        actual = module(*(x.to(device) for x in given), **lora)
    assert actual.device == device and actual.shape == expected.shape
    if calls.names == ["moe_fwd_streamed"]:
        assert relative_error(actual.cpu(), expected) <= forward_budget(torch.float32)
    else:
        assert torch.equal(actual.cpu(), expected)
    return calls.names


@torch.no_grad()
@pytest.mark.parametrize("count,name", [(7, "moe_fwd"), (8, "moe_fwd_streamed"), (9, "moe_fwd_streamed")])
def test_threshold(device, count, name):
    experts = KTExperts(E, H, I, stream_min_tokens=8).eval()
    assert run(experts, tokens(count), device) == [name]
    assert run(experts.train(), tokens(count), device) == ["moe_fwd"]
    experts.eval().stream_min_tokens = None
    assert run(experts, tokens(count), device) == ["moe_fwd"]


@torch.no_grad()
def test_tokens_are_counted_over_all_dimensions(device):
    experts = KTExperts(E, H, I, stream_min_tokens=8).eval()
    given = tokens(8, 2, 4)
    assert run(experts, given, device) == ["moe_fwd_streamed"]


def test_no_effect_on_the_cpu(device):
    given = inputs(T=8)
    expected = ktops.moe_sft(**given)
    with Calls() as calls:
        assert torch.equal(ktops.moe_sft(**given, stream_min_tokens=1), expected)
    assert calls.names == ["moe_fwd"]


def test_with_gradients_the_experts_stay_on_the_cpu(device):
    given = inputs(T=8)
    names = floating(given)
    results = []
    for options in ({}, {"stream_min_tokens": 1}):
        leaves = require_grad(on_device(given), *names)
        with Calls() as calls:
            output = ktops.moe_sft(**leaves, **options)
            results.append([output, *torch.autograd.grad(output.sum(), [leaves[name] for name in names])])
        assert calls.names == ["moe_sft_fwd", "moe_sft_bwd"]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_routes_without_weights(device):
    given = on_device(inputs(T=8)) | {"topk_weights": None, "reduce": False}
    with Calls() as calls:
        output = ktops.moe_sft(**given, stream_min_tokens=8)
    assert calls.names == ["moe_fwd_streamed"] and output.shape == (8, K, H)
    expected = ktops.moe_sft(**inputs(T=8) | {"topk_weights": None, "reduce": False})
    assert relative_error(output.cpu(), expected) <= forward_budget(torch.float32)


@torch.no_grad()
def test_norm_after_each_expert(device):
    norm = nn.LayerNorm(H, elementwise_affine=False)
    experts = KTExperts(E, H, I, post_expert_norm=norm, stream_min_tokens=8).eval()
    assert run(experts, tokens(8), device) == ["moe_fwd_streamed"]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(H, I), nn.Linear(H, I), nn.Linear(I, H)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def linear_experts() -> nn.ModuleList:
    return nn.ModuleList(Expert() for _ in range(E))


def stacked() -> KTExperts:
    return KTExperts(E, H, I, compute="bf16")


def in_format() -> KTExperts:
    weights = (ktops.quantize(torch.randn(E, *shape), "int8") for shape in ((2 * I, H), (H, I)))
    return KTExperts.from_parameters(*weights, compute="bf16")


MODULES = {
    "stacked": stacked,
    "in a format": in_format,
    "sequence": lambda: KTExpertSequence(in_format()),
    "list": linear_experts,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", MODULES)
def test_modules(device, kind):
    model = nn.ModuleDict({"experts": MODULES[kind]()}).eval()
    if kind == "list":
        ktops.swap_experts(model)
        assert isinstance(model["experts"], KTExpertList)
    names = ktops.stream_experts(model, 8)
    assert names == ["experts.stacked" if kind == "sequence" else "experts"]
    assert run(model["experts"], tokens(8), device) == ["moe_fwd_streamed"]
    assert run(model["experts"], tokens(7), device) == ["moe_fwd"]
    ktops.stream_experts(model, None)
    assert run(model["experts"], tokens(8), device) == ["moe_fwd"]


@torch.no_grad()
def test_setting_stays_when_experts_are_quantized(device):
    model = nn.ModuleDict({"experts": stacked()}).eval()
    ktops.stream_experts(model, 8)
    ktops.quantize_experts(model, "int8", show_progress=False)
    assert run(model["experts"], tokens(8), device) == ["moe_fwd_streamed"]


@contextmanager
def enabled() -> Iterator[None]:
    ktops.enable()
    yield
    ktops.disable()


@torch.no_grad()
def test_experts_of_transformers_with_adapters(device):
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": H, "moe_intermediate_size": I, "num_experts": E, "num_experts_per_tok": K}
    others = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16}
    config = Qwen3MoeConfig(**sizes, **others, intermediate_size=I, experts_implementation="ktops")
    with enabled():
        model = Qwen3MoeForCausalLM(config)
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        lora = LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
        model = get_peft_model(model, lora).eval()
        assert len(ktops.stream_experts(model, 8)) == 1
        experts = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
        assert run(experts, tokens(8), device) == ["moe_fwd_streamed"]
        assert run(experts, tokens(7), device) == ["moe_fwd"]


def test_errors(device):
    with pytest.raises(ValueError, match="stream_experts: min_tokens must be positive or None, got 0"):
        ktops.stream_experts(nn.ModuleDict({"experts": stacked()}), 0)
    with pytest.raises(ValueError, match="KTExperts: stream_min_tokens must be positive or None, got -1"):
        KTExperts(E, H, I, stream_min_tokens=-1)
    with pytest.raises(ValueError, match="moe_sft: stream_min_tokens must be positive or None, got 0"):
        ktops.moe_sft(**inputs(), stream_min_tokens=0)
    with pytest.raises(
        ValueError, match="stream_experts: model must have Mixture-of-Experts layers, got Linear"
    ):
        ktops.stream_experts(nn.Linear(2, 2), 8)


def test_experts_outside_the_op_are_named(device):
    model = nn.ModuleDict({"a": nn.ModuleDict({"experts": stacked()})})
    model["b"] = nn.ModuleDict({"experts": linear_experts()})
    with pytest.warns(
        UserWarning, match=r"b\.experts: torch\.nn\.modules\.container\.ModuleList is not in the"
    ):
        assert ktops.stream_experts(model, 8) == ["a.experts"]
    del model["a"]
    with pytest.raises(
        ValueError, match="stream_experts: ktops runs none of the experts of ModuleDict: torch"
    ):
        ktops.stream_experts(model, 8)


@torch.no_grad()
def test_compiled(device):
    experts = KTExperts(E, H, I, stream_min_tokens=8).eval()
    for count, name in ((7, "moe_fwd"), (8, "moe_fwd_streamed")):
        torch._dynamo.reset()
        backend = AotEagerAndRecordGraphs()

        @torch.compile(backend=backend, fullgraph=True, dynamic=True)
        def compiled(*given):
            return experts(*(x.to(device) for x in given)).cpu()

        given = tokens(count)
        assert torch.equal(compiled(*given), experts(*(x.to(device) for x in given)).cpu())
        (graph,) = backend.fw_graphs
        targets = [str(node.target) for node in graph.graph.nodes if str(node.target).startswith("kt.")]
        assert targets == [f"kt.{name}.default"]
