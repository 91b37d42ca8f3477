"""The attention implementation "ktops", against explicit scores and against eager models."""

from types import SimpleNamespace

import pytest
import torch
from every_model import FIRST_SPECIAL_TOKEN, tiny_model
from every_model_runs import step
from model_runs import Run, assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorForSeq2Seq

from ktops.cli.finetune.packing import PackingCollator, why_padded
from ktops.integrations.transformers import attention
from ktops.integrations.transformers.attention import attention_forward, use_attention
from ktops.testing.budgets import model_budget, relative_error

pytestmark = pytest.mark.usefixtures("enabled")

HEADS, KEY_HEADS, TOKENS = 4, 2, 11

MODELS = (
    "afmoe", "dbrx", "deepseek_v3", "ernie4_5_moe", "flint", "glm4_moe_lite", "gpt_oss", "granitemoe_swa",
    "jetmoe", "longcat_flash", "mimo_v2_flash", "minimax_m2", "mixtral", "nemotron_h", "olmoe",
    "openai_privacy_filter", "phimoe", "qwen3_moe", "step3p7",
)  # fmt: skip
"""Folders with attention layers of different kinds: head dimensions of keys and values that differ, sinks,
windows, queries that share keys, gates, norms."""

PADDED = {
    "deepseek_v32": "its attention is",
    "lfm2_moe": "carry a state",
    "llama4": "works in chunks",
    "jamba": "carry a state",
    "qwen3_next": "does not take packed sequences",
    "zaya": "carry a state",
}
"""Folders whose sequences cannot be packed, and why."""


def tensors(key_dim: int, value_dim: int) -> list[torch.Tensor]:
    """Returns query, key, value and sinks, in float64 and with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (2, HEADS, TOKENS, key_dim),
        (2, KEY_HEADS, TOKENS, key_dim),
        (2, KEY_HEADS, TOKENS, value_dim),
        (HEADS,),
    )
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def explicit(query, key, value, sinks, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    """Computes attention [B, T, heads, D] with all scores; a query that sees no key gets 0."""
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value))
    weights = (query @ key.mT * scaling).exp() * mask
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp().view(1, -1, 1, 1)
    return (weights / total.clamp(min=1e-300) @ value).transpose(1, 2)


def masks() -> dict[str, torch.Tensor | None]:
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    padded = causal & (torch.arange(TOKENS) > torch.tensor([[0], [3]])[..., None])
    window = causal & causal.triu(-2)
    hole = causal & (torch.arange(TOKENS) != 6)
    return {
        "causal": None,
        "window": window[None, None],
        "padded": padded[:, None],
        "hole": hole[None, None],
    }


PACKED = {"packed": (0, 2, 8, TOKENS), "alike": (0, 2, 5, 8, TOKENS)}
"""Where packed sequences start and end: of different lengths, and three of one length."""


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dims", [(8, 8), (8, 5), (5, 8)])
@pytest.mark.parametrize(
    "kind",
    [
        *("causal", "window", "padded", "packed_causal", "packed_window", "packed_hole"),
        *("alike_causal", "alike_window", "alike_hole"),
    ],
)
def test_equals_explicit_scores(kind, dims, sinks, monkeypatch):
    """In blocks of 4 queries, with gradients."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    query, key, value, sink = tensors(*dims)
    lengths = None
    packed, _, masked = kind.rpartition("_")
    mask = masks()[masked]
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    seen = causal if mask is None else mask
    if packed:
        query, key, value = (x[:1] for x in (query, key, value))
        lengths = torch.tensor(PACKED[packed], dtype=torch.int32)
        owner = torch.bucketize(torch.arange(TOKENS), lengths[1:], right=True)
        seen = seen & (owner[:, None] == owner)
    module = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS)
    parts = (query, key, value, *([sink] if sinks else []))
    actual, weights = attention_forward(
        module, query, key, value, mask, scaling=0.3, s_aux=sink if sinks else None, cu_seq_lens_q=lengths
    )
    expected = explicit(query, key, value, sink if sinks else None, seen, 0.3)
    assert weights is None
    budget = model_budget(torch.float64, TOKENS, 4)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(actual, parts, grad)
    for result, reference in zip(
        (actual, *found), (expected, *torch.autograd.grad(expected, parts, grad)), strict=True
    ):
        assert relative_error(result, reference) <= budget


class Attentions(TorchDispatchMode):
    """Counts calls of the flash kernel, and collects the sizes of the results of other operators."""

    def __init__(self):
        super().__init__()
        self.flash, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.flash += "flash_attention_for_cpu" in func._schema.name
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("dims", [(8, 8), (8, 5)])
@pytest.mark.parametrize("sinks", [False, True])
def test_no_matrix_of_scores(dims, sinks):
    query, key, value, sink = tensors(*dims)
    query, key, value = (x.repeat(1, 1, 40, 1) for x in (query, key, value))
    module = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS)
    with Attentions() as run:
        output, _ = attention_forward(module, query, key, value, None, s_aux=sink if sinks else None)
        output.sum().backward()
    assert run.flash == 2  # forward and backward
    assert run.largest <= 2 * query.numel()


def test_one_call_for_sequences_of_one_length():
    """Packed sequences that follow each other; of 3, of 5 and of 3 tokens again."""
    lengths = torch.tensor([0, 3, 3, 3, 5, 5, 3], dtype=torch.int32).cumsum(0)
    query = torch.randn(1, HEADS, int(lengths[-1]), 8, requires_grad=True)
    key, value = torch.randn(2, 1, KEY_HEADS, int(lengths[-1]), 8)
    module = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS)
    with Attentions() as run:
        attention_forward(module, query, key, value, None, cu_seq_lens_q=lengths)[0].sum().backward()
    assert run.flash == 2 * 3  # forward and backward


def test_blocks_leave_out_keys_that_no_query_sees(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    widths = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, *args, **kwargs):
        widths.append((query.shape[2], key.shape[2]))
        return sdpa(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    query, key, value, _ = tensors(8, 8)
    attention_forward(SimpleNamespace(num_key_value_groups=2), query, key, value, masks()["window"])
    assert widths == [(4, 4), (4, 6), (3, 5)]


def test_mask_that_all_queries_share(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    query, key, value, _ = tensors(8, 8)
    mask = (torch.arange(TOKENS) > torch.tensor([[0], [3]]))[:, None, None]
    module = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS)
    output, _ = attention_forward(module, query, key, value, mask, scaling=0.3)
    assert relative_error(output, explicit(query, key, value, None, mask, 0.3)) < 1e-12


def test_empty_sequences_in_a_row():
    query, key, value, _ = (x[:1] for x in tensors(8, 8))
    module = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS)
    starts = [torch.tensor(s) for s in ([0, 4, TOKENS], [0, 0, 4, 4, TOKENS, TOKENS])]
    expected, actual = (
        attention_forward(module, query, key, value, None, cu_seq_lens_q=s)[0] for s in starts
    )
    assert torch.equal(actual, expected)


def examples(lengths=(14, 20, 13)) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, FIRST_SPECIAL_TOKEN, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": i, "labels": [-100] * 3 + i[3:], "attention_mask": [1] * len(i)} for i in ids]


def padded_batch() -> dict[str, torch.Tensor]:
    tokenizer = SimpleNamespace(padding_side="right", pad=_pad)
    return dict(DataCollatorForSeq2Seq(tokenizer)(examples(), return_tensors="pt"))


def _pad(features, return_tensors, **kwargs) -> dict[str, torch.Tensor]:
    longest = max(len(feature["input_ids"]) for feature in features)
    return {
        name: torch.tensor([f[name] + [0] * (longest - len(f[name])) for f in features])
        for name in ("input_ids", "attention_mask")
    }


def without_padding(run: Run, batch: dict[str, torch.Tensor]) -> Run:
    run.logits = run.logits[batch["attention_mask"].bool()][None]
    return run


@pytest.mark.parametrize("folder", MODELS)
def test_packed_step_equals_eager_padded_step(folder):
    """Compares logits, loss, auxiliary loss and the gradient of every parameter in float32."""
    batch = padded_batch()
    eager = without_padding(step(tiny_model(folder, attn_implementation="eager"), folder, batch), batch)
    exact = tiny_model(folder, torch.float64, attn_implementation="eager")
    exact = without_padding(step(exact, folder, batch), batch)
    model = tiny_model(folder)
    assert use_attention(model) is None
    assert why_padded(model) is None
    assert_close(step(model, folder, PackingCollator()(examples())), eager, exact)


@pytest.mark.parametrize("folder", PADDED)
def test_sequences_that_cannot_be_packed(folder):
    model = tiny_model(folder)
    use_attention(model)
    assert PADDED[folder] in why_padded(model)
    assert model.training


def test_attention_that_depends_on_its_name_is_left_alone():
    model = tiny_model("deepseek_v32")
    assert "something else for each" in use_attention(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="something else for each"):
        model.set_attn_implementation("ktops")
    assert "an attention of its own" in use_attention(tiny_model("deepseek_v4"))
    assert use_attention(torch.nn.Linear(1, 1)) == "it is not a model of transformers"


def test_generation_equals_eager():
    ids = torch.tensor([[5, 7, 11, 13, 17]])
    texts = []
    for implementation in ("eager", "ktops"):
        model = tiny_model("gpt_oss", attn_implementation=implementation, output_router_logits=False).eval()
        texts.append(model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True).tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softcap": 30.0}, "cannot compute softcap"),
        ({"indices": torch.zeros(1)}, "cannot compute indices"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, "must divide one row of 11"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 4, 11]), "cu_seq_lens_k": torch.tensor([0, 5, 11])},
            "differ, but each sequence",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 4, 11]), "position_bias": torch.zeros(1)},
            "cannot be combined with position_bias",
        ),
    ],
)
def test_what_it_does_not_compute_is_an_error(arguments, message):
    query, key, value, _ = (x[:1] for x in tensors(8, 8))
    with pytest.raises(ValueError, match=message):
        attention_forward(SimpleNamespace(num_key_value_groups=2), query, key, value, None, **arguments)


def test_dropout_warns():
    query, key, value, _ = tensors(8, 8)
    module = SimpleNamespace(num_key_value_groups=2)
    with pytest.warns(UserWarning, match="attention with dropout by explicit matrices"):
        attention_forward(module, query, key, value, None, dropout=0.1)
