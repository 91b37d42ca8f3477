"""Adapters that transformers' Trainer trained through ktops."""

import pytest
import torch
from exports import assert_exports
from peft_models import Recorder
from peft_models import adapted as with_ktops
from tiny_adapters import load, save_config, updates
from tiny_models import tiny_batch
from transformers import Trainer, TrainingArguments

import ktops
from ktops.testing.budgets import model_budget, relative_error

LAYER_OPERATIONS = 16
"""Operations of a tiny model's two layers, one after the other."""

BUDGET = model_budget(torch.float32, 64, LAYER_OPERATIONS)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=tiny_batch()["input_ids"]).logits


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_they_load_merge_and_export(architecture, enabled, tmp_path):
    model = with_ktops(architecture)
    before = updates(model)
    data = [{"input_ids": row, "labels": row.clone()} for row in tiny_batch()["input_ids"]]
    options = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2)
    trainer = Trainer(model, options, train_dataset=data)
    with Recorder() as recorder:
        trainer.train()
    assert recorder.calls["moe_sft_bwd"]
    trainer.save_model(tmp_path / "adapter")
    trained = logits(model)
    ktops.disable()
    plain = load(architecture, tmp_path / "adapter")
    assert any(not torch.equal(update, before[name]) for name, update in updates(plain).items())
    with Recorder() as recorder:
        assert relative_error(logits(plain), trained) <= BUDGET
        assert relative_error(logits(plain.merge_and_unload()), trained) <= BUDGET
    assert not recorder.calls
    base = save_config(architecture, tmp_path)
    assert_exports(base, tmp_path / "adapter", tmp_path / "exports", architecture)
