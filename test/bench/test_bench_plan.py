"""What ktops plans is within a tenth of what its process then uses.

The only test of resident memory: nothing else shows that the parts that no allocator counts are right. The
models are large enough for weights and activations to weigh more than Python.
"""

import json

import pytest

from bench.plan import measure
from ktops.cli.finetune import corpus, demo_model

SIZES = {
    "vocab_size": 8000, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
}  # fmt: skip
LENGTH = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Returns the directory of a model of 220 MiB in bf16, and a file of examples longer than LENGTH."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    directory = tmp_path_factory.mktemp("model")
    made = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).to(torch.bfloat16)
    made.save_pretrained(directory)
    demo_model.train_tokenizer(corpus.stories(50), vocab_size=400).save_pretrained(directory)
    stories = corpus.stories(60)
    text = " ".join(stories)
    records = [{"prompt": story, "completion": text[: 12 * LENGTH]} for story in stories[:16]]
    data = directory / "data.json"
    data.write_text(json.dumps(records), encoding="utf-8")
    return directory, data


RUNS = {
    "bf16": (),
    "int8": ("--weight-format", "int8"),
}


@pytest.mark.parametrize("name", RUNS)
def test_finetune(name, model, tmp_path):
    directory, data = model
    usage = measure(
        "finetune", "--model", directory, "--data", data, "--max-length", LENGTH, "--batch-size", 8,
        "--max-steps", 2, "--eval-fraction", 0, "--output-dir", tmp_path / "out", *RUNS[name],
    )  # fmt: skip
    assert usage.status == 0, usage.output
    assert usage.ratio == pytest.approx(1, abs=0.1), usage


@pytest.mark.parametrize("num_threads", [1, 2])
def test_convert(model, tmp_path, num_threads):
    directory, _ = model
    usage = measure(
        "convert", directory, tmp_path / "out", "--weight-format", "int8", "--num-threads", num_threads
    )
    assert usage.status == 0, usage.output
    assert usage.ratio == pytest.approx(1, abs=0.1), usage


def test_chat(model):
    directory, _ = model
    usage = measure(
        "chat", directory, "--no-chat-template", "--prompt", "Hello " * 1000, "--max-new-tokens", 2
    )
    assert usage.status == 0, usage.output
    assert usage.ratio == pytest.approx(1, abs=0.1), usage
