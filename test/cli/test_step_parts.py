"""The time of a step, divided by a fake clock that only the parts of a model advance."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ktops.cli.finetune import step_parts
from ktops.cli.finetune.encoding import IGNORED
from ktops.cli.finetune.step_parts import PARTS, Clock, Watch
from ktops.cli.finetune.timing import KtTime, StepTimer
from ktops.integrations.chunked_loss import chunk_loss


class Time:
    """A clock that advances when it is told to."""

    def __init__(self):
        self.now = 0.0
        self.perf_counter = lambda: self.now


@pytest.fixture
def fake_time(monkeypatch) -> Time:
    fake = Time()
    monkeypatch.setattr(step_parts, "time", fake)
    return fake


class _Takes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, fake, forward, backward):
        fake.now += forward
        ctx.fake, ctx.seconds = fake, backward
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.fake.now += ctx.seconds
        return gradient, None, None, None


def slow(module: nn.Module, fake: Time, forward: float, backward: float) -> None:
    """Makes a module take that long in forward and backward."""
    compute = module.forward

    def forward_(*args, **kwargs):
        output = compute(*args, **kwargs)
        if isinstance(output, tuple):
            return (_Takes.apply(output[0], fake, forward, backward), *output[1:])
        return _Takes.apply(output, fake, forward, backward)

    module.forward = forward_


def tiny_model(checkpointing: bool = False):
    import peft
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = peft.get_peft_model(
        Qwen2MoeForCausalLM(config), peft.LoraConfig(r=2, target_modules=["q_proj", "gate_proj"])
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_modules_forward_and_backward(fake_time, checkpointing, chunked):
    model = tiny_model(checkpointing).train()
    if chunked:
        assert chunk_loss(model).reason is None
    base = model.get_base_model()
    for layer in base.model.layers:
        slow(layer.self_attn, fake_time, 1, 2)
        slow(layer.mlp.experts, fake_time, 10, 20)
        slow(layer.mlp.shared_expert.up_proj, fake_time, 100, 200)
        slow(layer.input_layernorm, fake_time, 1000, 2000)
    slow(base.lm_head, fake_time, 10_000, 20_000)
    clock = Clock()
    watch = Watch(model, clock)
    ids = torch.arange(3, 13)[None]
    clock.start("rest")
    model(input_ids=ids, labels=ids).loss.backward()
    parts = clock.stop()
    forwards = 2 if checkpointing else 1
    calls = 2 if chunked else 1  # one of no tokens, whose backward is not needed
    # without checkpointing, nothing before the first attention needs a gradient
    norms = 2 * 2000 if checkpointing else 2000
    assert parts == {
        "attention": 2 * (forwards * 1 + 2),
        "experts": 2 * (forwards * 10 + 20),
        "other matrices": 2 * (forwards * 100 + 200),
        "loss": 30_000,
        "rest": 2 * forwards * 1000 + norms + (calls - 1) * 10_000,
        "optimizer": 0,
        "data": 0,
    }
    watch.remove()
    clock.start("data")
    start = fake_time.now
    model(input_ids=ids, labels=ids).loss.backward()
    assert clock.stop()["data"] == fake_time.now - start > 0


def test_kt_ops_are_experts(fake_time, monkeypatch):
    monkeypatch.setattr(torch.ops.kt, "moe_fwd", lambda: setattr(fake_time, "now", fake_time.now + 3))
    clock = Clock()
    kt = KtTime(clock)
    kt.on_train_begin(None, None, None)
    clock.start("attention")
    fake_time.now += 1
    torch.ops.kt.moe_fwd()
    fake_time.now += 1
    parts = clock.stop()
    kt.on_train_end(None, None, None)
    assert (parts["experts"], parts["attention"]) == (3, 2)


def test_a_clock_between_steps_stands_still(fake_time):
    clock = Clock()
    with clock.during("loss"):
        fake_time.now += 1
    clock.start("data")
    assert clock.stop() == dict.fromkeys(PARTS, 0)


def test_steps_count_padding_apart(fake_time):
    timer = StepTimer()
    state = SimpleNamespace(log_history=[{}])
    assert timer.summary()["step_time"] is None
    timer.begin()
    fake_time.now += 1
    ids = torch.ones(2, 5, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    padded = {**batch, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}
    without_labels = {**batch, "labels": torch.full_like(ids, IGNORED)}
    timer.collected([padded, batch, without_labels])
    fake_time.now += 2
    timer.on_pre_optimizer_step(None, state, None)
    fake_time.now += 1
    timer.on_optimizer_step(None, state, None)
    timer.on_step_end(None, state, None)
    timer.on_log(None, state, None, {"loss": 1.0})
    parts = dict.fromkeys(PARTS, 0) | {"data": 1, "rest": 2, "optimizer": 1}
    assert state.log_history == [{"seconds": 4, "tokens": 17, "padding": 3, "parts": parts}]
    summary = timer.summary()
    assert (summary["tokens_per_second"], summary["padding_per_second"]) == (4.2, 0.8)
    assert summary["step_time"]["optimizer"] == {"seconds": 1, "share": 0.25}
