"""Training with packed batches, compared with padded ones."""

import io

import pytest
import torch
from rich.console import Console

from ktops.cli.finetune import training
from ktops.cli.finetune.corpus import instructions
from ktops.cli.finetune.encoding import encode, prepare_tokenizer
from ktops.cli.finetune.layouts import PlainText, from_alpaca
from ktops.cli.finetune.options import Options
from ktops.cli.finetune.packing import PackingCollator
from ktops.cli.finetune.progress import ProgressCallback
from ktops.cli.models import load_model
from ktops.testing.budgets import model_budget

STEPS = 4


@pytest.fixture
def encoded(tokenizer) -> list[dict]:
    """Answers to questions, and plain text, whose first token has a label."""
    prepare_tokenizer(tokenizer)
    texts = [from_alpaca(record) for record in instructions()[0][:8]]
    texts += [PlainText("", "Once upon a time. " * (1 + i)) for i in range(3)]
    return encode(texts, tokenizer, 64).examples


def train(model_directory, tokenizer, examples, tmp_path, packed: bool):
    """Trains all parameters in float32.

    Returns:
        Loss and norm of the gradients of every step, its tokens, and those of every forward with padding.
    """
    model = load_model(str(model_directory), torch.float32, "ktops")
    args = training.training_arguments(
        Options(save_steps=100),
        tmp_path / str(packed),
        max_steps=STEPS,
        learning_rate=0.1,
        optim="sgd",
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )
    progress = ProgressCallback(Console(file=io.StringIO()), "")
    trainer, *_ = training.make_trainer(model, tokenizer, examples, examples[:3], args, progress, packed)
    widths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [(entry["loss"], entry["grad_norm"]) for entry in entries]
    assert set(training.evaluate(trainer)) == {"loss", "token_accuracy", "answer_accuracy"}
    return losses, [entry["tokens"] for entry in entries], widths


def test_training_takes_the_same_steps(model_directory, tokenizer, encoded, tmp_path):
    """The same examples, tokens, losses and gradients, by gradient accumulation too; and no padding."""
    padded, packed = (
        train(model_directory, tokenizer, encoded, tmp_path, packed) for packed in (False, True)
    )
    assert packed[1] == padded[1]
    for left, right in zip(padded[0], packed[0], strict=True):
        assert right == pytest.approx(left, rel=STEPS * model_budget(torch.float32, 64, 60))
    assert packed[0][0] != packed[0][-1]
    assert sum(packed[2][: len(padded[2])]) < sum(padded[2])


def test_a_batch_is_one_row():
    examples = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "attention_mask": [1, 1, 1]},
        {"input_ids": [8, 9], "labels": [-100, 9], "attention_mask": [1, 1]},
    ]
    batch = PackingCollator()(examples)
    lists = {name: x.tolist() for name, x in batch.items() if isinstance(x, torch.Tensor)}
    assert lists == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[-100, 6, 7, -100, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "attention_mask": [[1, 1, 1, 1, 1]],
        "cu_seq_lens_q": [0, 3, 5],
        "cu_seq_lens_k": [0, 3, 5],
    }


def test_no_packing(ktops_command, model_directory, data_file, reload_here):
    status, out, err = ktops_command(
        "finetune", "--model", model_directory, "--data", data_file, "--max-length", 64, "--lora-rank", 2,
        "--max-steps", 1, "--eval-fraction", 0, "--no-packing",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "the examples of a batch are padded: --no-packing" in out
