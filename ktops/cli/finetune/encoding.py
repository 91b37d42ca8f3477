"""Turns examples into token ids, with loss only on the tokens of the answers."""

from collections.abc import Iterator
from dataclasses import dataclass

from ktops.cli.errors import UserError
from ktops.cli.finetune.layouts import Conversation, Example, PlainText
from ktops.cli.finetune.rendering import CHAT_TEMPLATE, answers

IGNORED = -100
"""Label of a token without loss (the ignore_index of torch.nn.functional.cross_entropy)."""


@dataclass
class Encoded:
    """Token ids of the examples, and how many examples were truncated or dropped."""

    examples: list[dict[str, list[int]]]
    truncated: int = 0
    dropped: int = 0


def prepare_tokenizer(tokenizer) -> None:
    """Gives a tokenizer a pad token and a chat template if it has none.

    Raises:
        UserError: the tokenizer has no end-of-text token, or cannot map tokens to characters.
    """
    if not tokenizer.is_fast:
        raise UserError("--model: the tokenizer must be a fast one (tokenizer.json)")
    if tokenizer.eos_token is None:
        raise UserError("--model: the tokenizer has no eos_token, so answers would not end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE


def encode(examples: list[Example], tokenizer, max_length: int) -> Encoded:
    """Returns ``{"input_ids", "attention_mask", "labels"}`` of every example, truncated to max_length.

    Labels are the token ids of answers (including the tokens that end them) and -100 elsewhere. In plain
    text, everything except the prompt is an answer, and the end-of-text token ends it. Examples whose answers
    are entirely past max_length are dropped. If a chat template writes earlier answers differently from the
    last one, for example without their reasoning, every answer becomes a separate example.

    Raises:
        UserError: the chat template rejects a conversation, or leaves out a part of it.
    """
    encoded = Encoded([])
    for example in examples:
        for ids, labels in _tokens(example, tokenizer):
            encoded.truncated += len(ids) > max_length
            # The model predicts each token from those before it, so the first token never counts.
            if all(label == IGNORED for label in labels[1:max_length]):
                encoded.dropped += 1
                continue
            encoded.examples.append(
                {
                    "input_ids": ids[:max_length],
                    "attention_mask": [1] * len(ids[:max_length]),
                    "labels": labels[:max_length],
                }
            )
    return encoded


def encode_question(example: Example, tokenizer) -> list[int]:
    """Returns the token ids of the prompt for an example's last answer; none for text without a prompt."""
    if isinstance(example, Conversation):
        return tokenizer(answers(example, tokenizer)[-1].prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(example.prompt)["input_ids"] if example.prompt else []
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _tokens(example: Example, tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """Yields (token ids, labels) of an example, several times if no single text holds all of its answers."""
    if isinstance(example, PlainText):
        text = example.prompt + example.completion
        tokens = tokenizer(text, return_offsets_mapping=True)
        ids = tokens["input_ids"]
        labels = _labels(tokens, [(len(example.prompt), len(text))]) if example.prompt else list(ids)
        if ids[-1] != tokenizer.eos_token_id:
            ids, labels = [*ids, tokenizer.eos_token_id], [*labels, IGNORED]
        yield ids, [*labels[:-1], ids[-1]]
        return
    for text, spans, after in _texts(example, tokenizer):
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, labels = tokens["input_ids"], _labels(tokens, spans)
        following = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        _learn_ends(ids + following, labels, tokens["offset_mapping"], text, spans, tokenizer)
        yield [*ids, *following][: len(labels)], labels


def _learn_ends(ids, labels: list[int], offsets, text: str, spans, tokenizer) -> None:
    """Labels the special token after each answer that does not end with one. GLM, for example, ends an answer
    with the heading of the next turn. For the last answer, this appends a label."""
    for _, end in spans:
        after = next((i for i, (start, _) in enumerate(offsets) if start >= end), len(offsets))
        written = (i for i in range(after - 1, -1, -1) if text[slice(*offsets[i])].strip())
        ended = _is_special(ids[next(written, 0)], tokenizer)
        if not ended and after < len(ids) and _is_special(ids[after], tokenizer):
            labels[after:] = [ids[after], *labels[after + 1 :]]


def _is_special(token: int, tokenizer) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and added.special


def _labels(tokens, spans: list[tuple[int, int]]) -> list[int]:
    """Returns the ids of tokens that overlap a (first, end) span of characters, and -100 for the others."""
    return [
        token if any(first < stop and start < end for first, end in spans) else IGNORED
        for token, (start, stop) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    ]


def _texts(conversation: Conversation, tokenizer) -> list[tuple[str, list[tuple[int, int]], str]]:
    """Returns the text of a conversation, the (first, end) spans of its answers, and what follows if it
    continues; one text per answer if the template rewrites earlier ones."""
    found = answers(conversation, tokenizer)
    spans = [(answer.start, len(answer.text)) for answer in found]
    whole = found[-1].text
    if all(whole.startswith(answer.text) for answer in found):
        return [(whole, spans, found[-1].after)]
    return [(answer.text, [span], answer.after) for answer, span in zip(found, spans, strict=True)]
