"""ktops.TrainingState in one process: what it saves, and its errors."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from transformers import Trainer, TrainingArguments

import ktops

pytestmark = pytest.mark.usefixtures("enabled", "single_thread")


def trainer(path, *, state=True, steps=4, **options) -> Trainer:
    torch.manual_seed(0)
    model = tiny_model("qwen3_moe", experts_implementation="ktops")
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"], lora_dropout=0.2))
    rows = torch.randint(3, 97, (8, 9))
    arguments = TrainingArguments(
        str(path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=2,
        save_only_model=True,
        save_steps=2,
        max_steps=steps,
        learning_rate=1e-2,
        weight_decay=0.1,
    )
    callbacks = [ktops.TrainingState()] if state else []
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model, arguments, train_dataset=data, callbacks=callbacks, **options)


def trained(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def test_resumed_bit_for_bit_with_dropout(tmp_path):
    """Optimizer, learning rate and random numbers go on; without them, the weights differ."""
    straight = trainer(tmp_path)
    straight.train()
    expected = trained(straight)
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in trained(resumed).items():
        assert torch.equal(parameter, expected[name]), name
    without = trainer(tmp_path, state=False)
    without.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not all(torch.equal(parameter, expected[name]) for name, parameter in trained(without).items())


def test_a_checkpoint_without_it(tmp_path):
    trainer(tmp_path, state=False, steps=2).train()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-2.*written without ktops\.TrainingState"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_elsewhere(tmp_path):
    """Not in output_dir, or in the place of another run's."""
    for name in ("old", "new"):
        trainer(tmp_path / name, steps=2).train()
    with pytest.raises(ValueError, match="is of another run"):
        trainer(tmp_path / "new").train(resume_from_checkpoint=str(tmp_path / "old" / "checkpoint-2"))
    with pytest.raises(FileNotFoundError, match="not in output_dir"):
        trainer(tmp_path / "third").train(resume_from_checkpoint=str(tmp_path / "old" / "checkpoint-2"))


def test_killed_while_an_older_checkpoint_is_deleted(tmp_path, monkeypatch):
    """The file is there when the Trainer deletes the checkpoint before; without it, none could be resumed."""
    seen = []

    def rotate(**arguments):
        seen.append(sorted(path.parent.name for path in tmp_path.glob("*/ktops_training_state.pt")))

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", rotate)
    trainer(tmp_path).train()
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]


def test_other_parameters(tmp_path):
    trainer(tmp_path, steps=2).train()
    run = trainer(tmp_path)
    layer = run.model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"trained .*layers\.0\.self_attn\.q_proj\.lora_A.*, which this"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_other_groups(tmp_path):
    """One learning rate goes to any number of groups; several do not."""

    trainer(tmp_path, steps=2).train()
    saved = tmp_path / "checkpoint-2" / "ktops_training_state.pt"
    state = torch.load(saved, weights_only=True)
    assert len(state["learning_rates"]) == 2 and len(set(state["learning_rates"])) == 1
    schedule = {**state["scheduler"], "base_lrs": [1e-2], "_last_lr": state["learning_rates"][:1]}
    torch.save({**state, "learning_rates": state["learning_rates"][:1], "scheduler": schedule}, saved)
    run = trainer(tmp_path)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(run.optimizer.param_groups) == 2
    torch.save({**state, "learning_rates": [1e-2, 1e-3, 1e-4]}, saved)
    with pytest.raises(ValueError, match="has 3 groups of parameters with different learning rates"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
