"""The loss in chunks of tokens against that of the model, and against torch.nn.functional.cross_entropy."""

import math

import peft
import pytest
import torch
from every_model import tiny_batch, tiny_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ktops._warn import warn_once
from ktops.integrations import cross_entropy
from ktops.integrations.chunked_loss import chunk_loss
from ktops.integrations.cross_entropy import chunked_cross_entropy, evaluate_cross_entropy
from ktops.testing.counts import counted

IGNORED = -100

FOLDERS = (
    "cohere2_moe",  # multiplies logits, ties the head to the embeddings
    "deepseek_v2",
    "gemma4",  # caps logits, shares keys and values between layers
    "granitemoe",  # divides logits
    "llama4",  # names no backbone
    "phimoe",  # has a bias in the head
    "qwen3_moe",
    "qwen3_vl_moe",
)
ROUTER_LOSS = {"granitemoe", "phimoe", "qwen3_moe"}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS_PER_CHUNK", 500)
    monkeypatch.setattr(cross_entropy, "LOGITS_PER_SOFTMAX", 200)


def batch_of(folder: str) -> dict[str, torch.Tensor]:
    batch = tiny_batch(folder)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, :5] = IGNORED
    return batch


def step(model, **inputs) -> tuple[float, dict[str, torch.Tensor]]:
    """Returns the loss and the gradient of every parameter."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return float(output.loss.detach()), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same_step(actual, expected):
    assert actual[0] == pytest.approx(expected[0], rel=1e-6)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("folder", FOLDERS)
def test_step_equals_that_with_all_logits(folder):
    overrides = {"output_router_logits": True} if folder in ROUTER_LOSS else {}
    if folder == "phimoe":
        overrides["lm_head_bias"] = True
    model = tiny_model(folder, **overrides)
    if folder == "granitemoe":
        model.config.logits_scaling = 3.0
    if folder == "gemma4":
        model.config.final_logit_softcapping = 2.0
    batch = batch_of(folder)
    expected = [step(model, **batch), step(model, **batch, num_items_in_batch=torch.tensor(50))]
    chunked = chunk_loss(model)
    assert chunked.reason is None
    actual = [step(model, **batch), step(model, **batch, num_items_in_batch=torch.tensor(50))]
    for one, other in zip(actual, expected, strict=True):
        assert_same_step(one, other)


def test_adapters_on_the_head_and_checkpointing():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("qwen3_moe"), config)
    batch = batch_of("qwen3_moe")
    expected = step(model, **batch)
    assert any("lm_head" in name for name in expected[1])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    chunk_loss(model)
    assert_same_step(step(model, **batch), expected)


def test_logits_without_labels_and_after_removal():
    model = tiny_model("qwen3_moe")
    batch = batch_of("qwen3_moe")
    last = {"input_ids": batch["input_ids"], "labels": batch["labels"][:, -2:], "logits_to_keep": 2}
    expected, expected_of_last = model(**batch), model(**last)
    chunked = chunk_loss(model)
    assert chunk_loss(model) is chunked
    assert model(**batch).logits.shape == (*batch["labels"].shape[:1], 0, expected.logits.shape[-1])
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, expected.logits)
    assert torch.equal(model(**last).logits, expected_of_last.logits)
    assert model(**last).loss == expected_of_last.loss
    with torch.no_grad():
        assert model(**batch).loss == pytest.approx(float(expected.loss.detach()), rel=1e-6)
    has_label = functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:] != IGNORED
    assert torch.equal(chunked.predictions, expected.logits.argmax(-1) * has_label)
    chunked.remove()
    assert torch.equal(model(**batch).logits, expected.logits)


def test_another_loss_is_kept():
    def own_loss(logits, labels, vocab_size, **kwargs):
        return logits.square().mean()

    model = tiny_model("qwen3_moe")
    model.loss_function = own_loss
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"Qwen3MoeForCausalLM .* all tokens, because its loss is own_loss"):
        assert chunk_loss(model).reason is not None
    assert model.loss_function is own_loss


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda output: setattr(output, "loss", output.loss + 1), "in chunks, it would be"),
        (lambda output: setattr(output, "logits", None), "that fails with AttributeError"),
    ],
)
def test_another_model_keeps_its_loss(change, reason):
    model = tiny_model("qwen3_moe")

    def other_with_few_logits(module, args, kwargs, output):
        if output.logits.shape[-2] == 0:
            change(output)
        return output

    model.register_forward_hook(other_with_few_logits, with_kwargs=True)
    batch = batch_of("qwen3_moe")
    expected = step(model, **batch)
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=reason):
        chunk_loss(model)
    assert step(model, **batch)[0] == expected[0]


def bfloat16_problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns hidden states [40, 16], a head [97, 16] and targets [40]."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(40, 16, generator=generator).bfloat16()
    head = torch.randn(97, 16, generator=generator).bfloat16()
    return hidden_states, head, torch.randint(97, (40,), generator=generator)


def test_gradients_are_those_of_cross_entropy_in_bfloat16():
    hidden_states, head, targets = bfloat16_problem()
    results = []
    for loss in (
        lambda x, w: chunked_cross_entropy(lambda c: functional.linear(c, w), x, targets, 97, [w]),
        lambda x, w: functional.cross_entropy(functional.linear(x, w).float(), targets, reduction="sum"),
    ):
        leaves = [t.clone().requires_grad_() for t in (hidden_states, head)]
        total = loss(*leaves)
        (total * 0.25).backward()
        results.append((total.detach(), *(leaf.grad for leaf in leaves)))
    (total, *grads), (expected, *expected_grads) = results
    torch.testing.assert_close(total, expected)
    for gradient, other in zip(grads, expected_grads, strict=True):
        error = (gradient - other).float().norm() / other.float().norm()
        assert error <= torch.finfo(torch.bfloat16).eps


def test_predictions_without_gradients():
    hidden_states, head, targets = bfloat16_problem()
    logits = functional.linear(hidden_states, head)
    total, guesses = evaluate_cross_entropy(
        lambda chunk: functional.linear(chunk, head), hidden_states, targets, 97
    )
    assert torch.equal(guesses, logits.argmax(-1))
    torch.testing.assert_close(total, functional.cross_entropy(logits.float(), targets, reduction="sum"))


def test_no_labels_at_all():
    model = tiny_model("qwen3_moe")
    batch = tiny_batch("qwen3_moe")
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    expected = step(model, **batch, num_items_in_batch=7)
    chunk_loss(model)
    assert_same_step(step(model, **batch, num_items_in_batch=7), expected)


def test_no_labels_and_no_number_of_items():
    """The loss is that of PyTorch, NaN, and so are the gradients, zeros."""
    model = tiny_model("qwen3_moe", output_router_logits=False)
    batch = tiny_batch("qwen3_moe")
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    loss, expected = step(model, **batch)
    assert math.isnan(loss)
    chunk_loss(model)
    loss, actual = step(model, **batch)
    assert math.isnan(loss)
    assert not actual["lm_head.weight"].any()
    torch.testing.assert_close(actual, expected)


def test_compiled_model():
    model = tiny_model("qwen3_moe")
    batch = batch_of("qwen3_moe")
    expected = step(model, **batch)
    chunk_loss(model)
    compiled = torch.compile(model, backend="eager")
    compiled(**batch).loss.backward()  # once compiled, and once from the cache
    loss, gradients = step(compiled, **batch)
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    assert_same_step((loss, gradients), expected)


class Products(TorchDispatchMode):
    """Adds up the rows that are multiplied with a weight."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight, self.rows = weight.data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and args[1].data_ptr() == self.weight:
            self.rows += len(args[0])
        return func(*args, **(kwargs or {}))


def test_frozen_head_takes_one_product_each_way_of_tokens_with_labels():
    model = tiny_model("qwen3_moe").requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    batch = batch_of("qwen3_moe")
    chunk_loss(model)
    with Products(model.lm_head.weight) as products:
        model(**batch).loss.backward()
    labels = int((batch["labels"][:, 1:] != IGNORED).sum())
    assert products.rows == 2 * labels
    assert model.lm_head.weight.grad is None


def test_memory_is_that_of_a_chunk():
    tokens, vocab_size = 64, 5000
    head, targets = torch.randn(vocab_size, 8), torch.randint(vocab_size, (tokens,))
    cross_entropy.LOGITS_PER_CHUNK = 4 * vocab_size
    hidden_states = torch.randn(tokens, 8, requires_grad=True)
    with counted() as counts:
        chunked_cross_entropy(
            lambda chunk: functional.linear(chunk, head), hidden_states, targets, vocab_size
        ).backward()
    assert 4 * 4 * vocab_size < counts.peak < 4 * 6 * vocab_size


@pytest.mark.parametrize(
    ("tokens", "most", "sizes"),
    [
        (1, 700, [1]),
        (511, 255, [171, 171, 169]),
        (511, 256, [256, 255]),
        (512, 700, [512]),
        (513, 700, [512, 1]),
        (1100, 1100, [768, 332]),
        (1300, 800, [768, 532]),
    ],
)
def test_chunks_are_of_blocks_that_are_multiplied_fast(tokens, most, sizes):
    """256 tokens or a multiple of it, if so many have no more logits than a chunk may have."""
    cross_entropy.LOGITS_PER_CHUNK = 20 * most
    found = []

    def logits_of(chunk: torch.Tensor) -> torch.Tensor:
        found.append(len(chunk))
        return functional.linear(chunk, torch.ones(20, 4))

    evaluate_cross_entropy(logits_of, torch.ones(tokens, 4), torch.zeros(tokens, dtype=torch.long), 20)
    assert found == sizes


def test_gradient_of_logits_is_not_copied():
    """Between a head and the chunked loss, nothing else is as large as the logits."""
    tokens, vocab_size = 40, 5000
    model = tiny_model("qwen3_moe", vocab_size=vocab_size).requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    chunk_loss(model)
    cross_entropy.LOGITS_PER_CHUNK = tokens * vocab_size
    ids = torch.randint(100, (1, tokens))
    with counted() as counts:
        model(input_ids=ids, labels=ids).loss.backward()
    assert counts.peak < 1.5 * 4 * tokens * vocab_size
