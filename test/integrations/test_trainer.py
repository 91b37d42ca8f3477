"""Runs the Hugging Face Trainer on tiny models with LoRA on attention and experts, computed by the op."""

import pytest
import torch
from peft_models import Recorder, adapted
from tiny_models import VOCAB_SIZE
from transformers import Trainer, TrainerCallback, TrainingArguments

import ktops
from ktops.testing.budgets import gradient_budget, relative_error
from ktops.testing.compare import one_thread

LAYERS = 2

pytestmark = pytest.mark.usefixtures("enabled")


def dataset(rows: int = 16, length: int = 8) -> list[dict]:
    """Sequences that count up by one or two, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(3, VOCAB_SIZE - 2 * length, (rows, 1), generator=generator)
    ids = starts + torch.arange(length) * torch.randint(1, 3, (rows, 1), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def trainer(tmp_path, model=None, **arguments) -> Trainer:
    keys = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "seed": 0,
    }
    model = adapted("qwen3_moe", dtype=torch.bfloat16) if model is None else model
    return Trainer(model, TrainingArguments(**{**keys, **arguments}), train_dataset=dataset())


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


class Probe(TrainerCallback):
    """Returns the calls of kt operators during training."""

    def on_train_begin(self, *args, **kwargs):
        self.recorder = Recorder()
        self.recorder.__enter__()

    def on_train_end(self, *args, **kwargs):
        self.recorder.__exit__(None, None, None)


def test_loss_falls(tmp_path):
    run = trainer(tmp_path, max_steps=24)
    before = {name: value.clone() for name, value in adapters(run).items()}
    run.train()
    history = losses(run)
    assert len(history) == 24
    assert sum(history[-4:]) < 0.7 * sum(history[:4])
    for name, value in adapters(run).items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[name]), f"{name} was not trained"


def checkpointing(kind: str) -> dict:
    options = {
        "none": None,
        "reentrant": {"use_reentrant": True},
        "non-reentrant": {"use_reentrant": False},
        "selective": {"use_reentrant": False, "context_fn": ktops.checkpoint_context_fn},
    }[kind]
    return {"gradient_checkpointing": options is not None, "gradient_checkpointing_kwargs": options}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(losses, adapters) of a run without checkpointing."""
    ktops.enable()
    with one_thread():
        run = trainer(tmp_path_factory.mktemp("plain"))
        run.train()
    ktops.disable()
    return losses(run), adapters(run)


@pytest.mark.parametrize(
    ("kind", "forwards"),
    [
        ("none", {"moe_sft_fwd": 1}),
        ("reentrant", {"moe_fwd": 1, "moe_sft_fwd": 1}),
        ("non-reentrant", {"moe_sft_fwd": 2}),
        ("selective", {"moe_sft_fwd": 1}),
    ],
)
def test_gradient_checkpointing(plain, tmp_path, kind, forwards):
    model = adapted("qwen3_moe", dtype=torch.bfloat16)
    model.enable_input_require_grads()
    run = trainer(tmp_path, model, **checkpointing(kind))
    probe = Probe()
    run.add_callback(probe)
    run.train()
    calls = {"moe_sft_bwd": 1, **forwards}
    assert probe.recorder.calls == {name: 4 * LAYERS * count for name, count in calls.items()}
    expected_losses, expected_adapters = plain
    assert losses(run) == expected_losses
    for name, value in expected_adapters.items():
        assert torch.equal(adapters(run)[name], value), name


def test_resume_from_checkpoint(tmp_path):
    whole = trainer(tmp_path / "whole", max_steps=8)
    whole.train()
    trainer(tmp_path / "parts", max_steps=8, save_strategy="steps", save_steps=4).train()
    resumed = trainer(tmp_path / "parts", max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert len(losses(whole)) == 8
    assert losses(resumed) == losses(whole)
    for name, value in adapters(whole).items():
        assert torch.equal(adapters(resumed)[name], value), name


def test_accumulation_equals_the_large_batch(tmp_path):
    before = adapters(trainer(tmp_path, adapted("qwen3_moe")))
    results = []
    for size, steps in ((4, 1), (1, 4)):
        run = trainer(
            tmp_path,
            adapted("qwen3_moe"),
            optim="sgd",  # steps are proportional to the gradient
            learning_rate=1.0,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        run.train()
        results.append({"loss": torch.tensor(losses(run)), **adapters(run)})
    large, small = results
    for name, value in large.items():
        assert relative_error(small[name], value) <= gradient_budget(torch.float32, inner_size=64), name
        assert name == "loss" or relative_error(value, before[name]) > 1e-3
