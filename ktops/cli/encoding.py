"""Turns conversations into token ids, with the loss on the tokens of the answers only."""

from dataclasses import dataclass

from ktops.cli.data import Conversation
from ktops.cli.errors import UserError

IGNORED = -100
"""Label of a token without loss (the ignore_index of torch.nn.functional.cross_entropy)."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "{{ '### Response:\\n' + message.content + eos_token }}"
    "{%- else -%}"
    "{{ '' if loop.first else '\\n\\n' }}"
    "{{ '### ' + {'user': 'Instruction', 'system': 'System', 'tool': 'Input'}[message.role] + ':\\n' }}"
    "{{ message.content }}"
    "{%- if loop.last or loop.nextitem.role == 'assistant' -%}{{ '\\n\\n' }}{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
)
"""Given to a tokenizer that has no chat template: the headings of the alpaca prompt, the answer ended by
eos."""


@dataclass
class Encoded:
    """Token ids of the examples, and how many examples had to be shortened or left out."""

    examples: list[dict[str, list[int]]]
    truncated: int = 0
    dropped: int = 0


def prepare_tokenizer(tokenizer) -> None:
    """Gives a tokenizer what training needs and it lacks: a pad token and a chat template.

    Raises:
        UserError: the tokenizer has no end-of-text token, or cannot map tokens to characters.
    """
    if not tokenizer.is_fast:
        raise UserError("--model: the tokenizer must be a fast one (tokenizer.json)")
    if tokenizer.eos_token is None:
        raise UserError("--model: the tokenizer has no eos_token, so that answers could not end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE


def encode(conversations: list[Conversation], tokenizer, max_length: int) -> Encoded:
    """``{"input_ids", "attention_mask", "labels"}`` of every conversation, cut to max_length tokens.

    Labels are the token ids where an answer stands (with the tokens that end it) and -100 elsewhere. A
    conversation whose answers lie wholly behind max_length is dropped. A chat template that writes earlier
    answers differently from the last one (as those that leave out old reasoning do) gives one example for
    each answer.
    """
    encoded = Encoded([])
    for conversation in conversations:
        for text, answers in _render(conversation, tokenizer):
            tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            labels = [
                token if any(first <= start < end for first, end in answers) else IGNORED
                for token, (start, _) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
            ]
            encoded.truncated += len(labels) > max_length
            # The model predicts token i from the tokens before it: the first token never counts.
            if all(label == IGNORED for label in labels[1:max_length]):
                encoded.dropped += 1
                continue
            encoded.examples.append(
                {
                    "input_ids": tokens["input_ids"][:max_length],
                    "attention_mask": tokens["attention_mask"][:max_length],
                    "labels": labels[:max_length],
                }
            )
    return encoded


def _render(conversation: Conversation, tokenizer) -> list[tuple[str, list[tuple[int, int]]]]:
    """The text of a conversation and the (start, end) characters of its answers; several if answers don't
    nest."""

    def render(messages, **kwargs):
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        except Exception as error:  # templates raise what they like, in a jinja2 exception
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template refuses a conversation with the roles {roles}: {error}"
            ) from None

    turns = []
    for i, message in enumerate(conversation):
        if message["role"] == "assistant":
            prompt = render(conversation[:i], add_generation_prompt=True)
            text = render(conversation[: i + 1])
            if not text.startswith(prompt):
                prompt = render(conversation[:i])
            if not text.startswith(prompt):
                raise UserError("the chat template does not keep a prompt unchanged when its answer is added")
            turns.append((text, (len(prompt), len(text))))
    whole = turns[-1][0]
    if all(whole.startswith(text) for text, _ in turns):
        return [(whole, [span for _, span in turns])]
    return [(text, [span]) for text, span in turns]
