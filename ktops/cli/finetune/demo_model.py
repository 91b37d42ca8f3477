"""A small Mixture-of-Experts language model, created and pretrained locally from the packaged corpus."""

from pathlib import Path

from ktops.cli.finetune import corpus
from ktops.cli.finetune.layouts import from_alpaca
from ktops.cli.finetune.rendering import CHAT_TEMPLATE

VOCAB_SIZE = 2048
MAX_LENGTH = 128
"""Maximum number of tokens in a pretraining sequence."""

NUM_STORIES = 2500
END, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(documents: list[str], vocab_size: int = VOCAB_SIZE):
    """Trains a byte-level BPE tokenizer on documents; returns a transformers tokenizer with the default chat
    template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )


def config(tokenizer):
    """Returns a Qwen3-MoE configuration with 7 million parameters: 2 layers of 16 experts, 2 per token.

    Rows of experts have 256 weights, so every weight format can hold them, even those with blocks of 256.
    """
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        # About hidden_size ** -0.5. With the usual 0.02, attention learns to copy words much later.
        initializer_range=0.0625,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def create(tokenizer, dtype, experts_implementation: str):
    """Returns a randomly initialized model whose routers already distinguish tokens: their logits have unit
    variance."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        config(tokenizer), dtype=dtype, experts_implementation=experts_implementation
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=model.config.hidden_size**-0.5)
    return model


def pretraining_examples(documents: list[str], tokenizer) -> list[dict[str, list[int]]]:
    """Returns one sequence per document, ended by the end-of-text token and cut to MAX_LENGTH tokens.

    Documents are not packed into shared sequences. A name stands out in its own document, so the model learns
    to repeat it sooner.
    """
    examples = []
    for ids in tokenizer(documents)["input_ids"]:
        tokens = [*ids, tokenizer.eos_token_id][:MAX_LENGTH]
        examples.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": tokens})
    return examples


def make_tokenizer():
    """Returns (pretraining documents, a tokenizer trained on them and on the text of the instructions)."""
    documents = corpus.stories(NUM_STORIES)
    train, _ = corpus.instructions()
    conversations = [
        "### Instruction:\n{}\n\n### Response:\n{}".format(
            *(message["content"] for message in from_alpaca(record).messages)
        )
        for record in train
    ]
    return documents, train_tokenizer(documents + conversations)


def save(model, tokenizer, directory: Path) -> None:
    """Writes the model and its tokenizer as a regular Hugging Face model directory."""
    model.config.output_router_logits = False
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
