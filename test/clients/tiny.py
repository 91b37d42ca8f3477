"""Tiny models with a tokenizer, and records to train them on, as files that clients read."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from ktops.cli.finetune import corpus, demo_model

sys.path.append(str(Path(__file__).parents[1] / "integrations"))
from tiny_models import tiny_model

ARCHITECTURES = ("qwen3_moe", "deepseek_v3", "mixtral")

NUM_RECORDS = 16


def save_model(folder: Path, architecture: str = "qwen3_moe", **overrides) -> Path:
    """Saves a random float32 model and a tokenizer with a chat template; returns the folder.

    Args:
        architecture: one of ``ARCHITECTURES``.
        overrides: keys of the model's configuration, and ``dtype``.
    """
    tokenizer = demo_model.train_tokenizer(corpus.stories(50), vocab_size=400)
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": None, "max_position_embeddings": 512}
    model = tiny_model(architecture, **sizes | tokens | overrides)
    demo_model.save(model, tokenizer, folder)
    return folder


def save_records(file: Path, layout: Callable[[str, str, str], dict]) -> Path:
    """Saves the results of ``layout(question, answer, worse answer)`` as JSON lines; returns the file."""
    records = [(record["instruction"], record["output"]) for record in corpus.instructions()[0][:NUM_RECORDS]]
    lines = [
        json.dumps(layout(question, answer, " ".join(reversed(answer.split()))))
        for question, answer in records
    ]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def messages(question: str, answer: str) -> list[dict[str, str]]:
    """Returns a conversation of two messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversation(question: str, answer: str, worse: str) -> dict:
    """A layout of records."""
    return {"messages": messages(question, answer)}
