"""Experts that swap_experts does not replace, and those that it tests first."""

import pytest
import torch
import transformers
from model_runs import MODEL_BUDGET
from moe_blocks import ClampedMLP, E, GatedMLP, H, LoopBlock, Stacked, UngatedMLP
from torch import nn

import ktops
from ktops.testing.budgets import relative_error


def test_undeclared_stacked_experts_are_tried_first():
    model = nn.ModuleDict({"experts": Stacked()})
    weights, ids = torch.rand(7, E).topk(2)
    x = torch.randn(7, H)
    expected = model["experts"](x, ids, weights)
    assert ktops.swap_experts(model) == ["experts"]
    assert relative_error(model["experts"](x, ids, weights), expected) < MODEL_BUDGET


def hooked():
    experts = Stacked()
    experts.register_forward_hook(lambda module, args, output: output)
    return experts


def replaced_forward():
    experts = Stacked()
    experts.forward = experts.forward
    return experts


def uneven():
    experts = LoopBlock().experts
    experts[3].act_fn = nn.GELU()
    return experts


REFUSED = {
    "scales its input": (lambda: Stacked(scale_input=True), "it computes something else"),
    "no such activation": (lambda: Stacked(activation=nn.Tanh()), "ktops has no activation Tanh"),
    "hooked": (hooked, "it has hooks"),
    "offloaded": (replaced_forward, "its forward was replaced"),
    "clamped": (lambda: LoopBlock(ClampedMLP).experts, "it computes something else"),
    "drops its output": (
        lambda: LoopBlock(UngatedMLP, dropout=0.5, drop_output=True).experts,
        "it computes something else",
    ),
    "uneven": (uneven, "differ in shape, dtype, bias or activation"),
    "float8": (lambda: LoopBlock().to(torch.float8_e5m2).experts, "stored in torch.float8_e5m2"),
    "no gate": (lambda: nn.ModuleList([nn.Linear(H, H)]), "have no gate_proj/up_proj/down_proj or w1/w3/w2"),
    "empty": (lambda: nn.ModuleList(), "not all modules of one class"),
    "remote experts": (lambda: nn.ModuleList([GatedMLP(), None]), "not all modules of one class"),
    "unknown": (lambda: nn.Linear(H, H), "its weights are neither stacked, gate_up_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_experts_stay_and_are_named(case):
    make_experts, reason = REFUSED[case]
    model = nn.Module()
    model.experts = experts = make_experts()
    with pytest.warns(UserWarning) as caught:
        assert ktops.swap_experts(model) == []
    [message] = [str(w.message) for w in caught]
    assert reason in message and type(experts).__qualname__ in message and "(experts)" in message
    assert "docs/models.md" in message
    assert model.experts is experts


def test_refused_models_of_transformers_warn_once():
    sizes = {"vocab_size": 97, "d_model": 32, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    layers = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = transformers.SwitchTransformersConfig(**sizes, **layers, dense_act_fn="tanh")
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    with pytest.warns(UserWarning, match=r"SwitchTransformersExperts \(.*and 1 more\)") as caught:
        assert ktops.swap_experts(model) == []
    assert len(caught) == 1


@pytest.mark.parametrize("experts", [nn.ModuleList(), nn.Linear(3, 3)])
def test_unknown_save_is_an_error(experts):
    with pytest.raises(ValueError, match=r"swap_experts: save must be one of .*, got 'all'"):
        ktops.swap_experts(experts, save="all")


def test_model_without_experts_is_an_error():
    with pytest.raises(ValueError, match=r"must have Mixture-of-Experts layers, got Linear .*docs/models.md"):
        ktops.swap_experts(nn.Linear(3, 3))
