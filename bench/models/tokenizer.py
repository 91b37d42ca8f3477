"""Tokenizers with the vocabulary size and the special tokens' ids of published models."""

import json

from ktops.cli.finetune import corpus, demo_model


def make_tokenizer(config: dict):
    """Trains a byte-level BPE tokenizer on the packaged corpus and fills its vocabulary with unused tokens.

    Args:
        config: a model's, with its ``vocab_size`` and the ids of its special tokens.

    Returns:
        A transformers tokenizer with a chat template.

    Raises:
        ValueError: the vocabulary is too small for all bytes.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    size = config["vocab_size"]
    documents = corpus.stories(demo_model.NUM_STORIES)
    trained = demo_model.train_tokenizer(documents, min(size, demo_model.VOCAB_SIZE))
    if len(trained) > size:
        raise ValueError(f"vocab_size must be at least {len(trained)}, got {size}")
    end, pad = _special_ids(config)
    special = {end: demo_model.END, pad: demo_model.PAD}
    vocabulary = trained.get_vocab()
    others = sorted(vocabulary.keys() - {demo_model.END, demo_model.PAD}, key=vocabulary.__getitem__)
    free = (number for number in range(size) if number not in special)
    ids = {token: number for number, token in special.items()}
    ids |= dict(zip(others, free, strict=False))
    ids |= {f"<|unused_{number}|>": number for number in free}
    state = json.loads(trained.backend_tokenizer.to_str())
    state["model"]["vocab"] = ids
    for token in state["added_tokens"]:
        token["id"] = ids[token["content"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token=demo_model.END,
        pad_token=demo_model.PAD,
        chat_template=trained.chat_template,
    )


def _special_ids(config: dict) -> tuple[int, int]:
    """Returns the ids of the end and the padding token; if none is named, padding has the next free one."""
    end = config.get("eos_token_id") or 0
    end = end[0] if isinstance(end, list) else end
    pad = config.get("pad_token_id")
    if pad is None or pad == end:
        pad = end + 1 if end + 1 < config["vocab_size"] else end - 1
    return end, pad
