"""Attention of a single query, as in decoding: against all scores, and against models that expand latents."""

import copy
import pickle

import peft
import pytest
import torch
from tiny_models import tiny_model

from ktops.integrations.transformers import attention, latent_attention
from ktops.integrations.transformers.attention import use_attention
from ktops.integrations.transformers.single_query import attend_single
from ktops.testing.budgets import forward_budget, relative_error
from ktops.testing.counts import counted

pytestmark = pytest.mark.usefixtures("enabled")

B, S, SCALING = 2, 37, 0.3


def exact(query, key, value, mask, sinks) -> torch.Tensor:
    query, key, value = (tensor.double() for tensor in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * SCALING
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    total = scores.exp().sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp().view(1, -1, 1, 1)
    return (scores.exp() / total @ value.repeat_interleave(groups, 1)).transpose(1, 2)


MASKS = {
    "none": None,
    "padded": (torch.arange(S) > torch.tensor([[0], [5]]))[:, None, None],
    "heads": (torch.arange(S) % torch.arange(2, 10)[:, None] > 0).view(1, 8, 1, S),
    "added": torch.linspace(-2, 2, S).view(1, 1, 1, S),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize(("key_heads", "value_dim"), [(2, 16), (2, 24), (8, 16)])
def test_products(key_heads, value_dim, mask, sinks, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, 8, 1, 16), (B, key_heads, S, 16), (B, key_heads, S, value_dim), (8,))
    query, key, value, logits = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    chosen, given = MASKS[mask], logits if sinks else None
    if chosen is not None and chosen.is_floating_point():
        chosen = chosen.to(dtype)
    output = attend_single(query, key, value, chosen, given, SCALING)
    assert output.shape == (B, 1, 8, value_dim) and output.dtype == dtype
    assert relative_error(output, exact(query, key, value, chosen, given)) < 4 * forward_budget(dtype)


IDS = torch.arange(3, 27).view(2, 12)
PADDING = torch.ones(2, 12, dtype=torch.long).index_fill_(1, torch.tensor([0, 1]), 0)
PADDING[0] = 1


def steps(model) -> torch.Tensor:
    """Returns the logits of a prompt's last token and of four steps."""
    with torch.no_grad():
        output = model(IDS[:, :8], attention_mask=PADDING[:, :8], use_cache=True)
        logits = [output.logits[:, -1:]]
        for end in range(9, 13):
            output = model(
                IDS[:, end - 1 : end], attention_mask=PADDING[:, :end], past_key_values=output.past_key_values
            )
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


ARCHITECTURES = ("deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding(architecture):
    """Against transformers' sdpa in float64."""
    expected = steps(tiny_model(architecture, attn_implementation="sdpa").eval().double())
    model = tiny_model(architecture).eval()
    assert use_attention(model) is None
    assert relative_error(steps(model), expected) < 1e-5
    assert relative_error(steps(model.double()), expected) < 1e-12


def has_latents() -> bool:
    """True if transformers caches latents, as it does since 5.24."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    return hasattr(DeepseekV3Attention, latent_attention.EXPAND)


def test_latents_are_not_expanded_in_a_step():
    model = tiny_model("deepseek_v3").eval()
    use_attention(model)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        with counted() as counts:
            model(IDS[:, :1], past_key_values=cache)
    if has_latents():
        assert counts.operators["aten::scaled_dot_product_attention"] == 0


def test_hooks_and_adapters_on_the_projection_are_run():
    """kv_b_proj cannot be split then, so latents are expanded."""
    model = tiny_model("deepseek_v3").eval()
    expected = steps(model)
    use_attention(model)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda module, inputs, output: output * 2)
    doubled = steps(model)
    assert relative_error(doubled, expected.double()) > 1e-2
    model.set_attn_implementation("sdpa")
    assert relative_error(doubled, steps(model).double()) < 1e-5


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_adapters_on_the_projection(options):
    model = tiny_model("deepseek_v3").eval()
    config = peft.LoraConfig(r=4, target_modules=["kv_b_proj", "o_proj"], init_lora_weights=False, **options)
    model = peft.get_peft_model(model, config).eval()
    expected = steps(model)
    use_attention(model.get_base_model())
    with torch.no_grad():
        assert relative_error(steps(model), expected.double()) < 1e-5
        with model.disable_adapter():
            without = steps(model)
    assert relative_error(without, expected.double()) > 1e-2
    model.merge_adapter()
    assert relative_error(steps(model), expected.double()) < 1e-5


def test_copies_and_gradients():
    model = tiny_model("deepseek_v3").eval()
    expected = steps(model)
    use_attention(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.model.layers[0].self_attn.kv_b_proj.weight.data.mul_(3)
        assert relative_error(steps(other), expected.double()) > 1e-2
        assert relative_error(steps(model), expected.double()) < 1e-5
    model(IDS[:, :1], labels=IDS[:, :1]).logits.sum().backward()
    assert model.model.layers[0].self_attn.kv_b_proj.weight.grad is not None
    assert attention.why_not(model) is None
