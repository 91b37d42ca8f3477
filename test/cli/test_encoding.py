"""Tokens and labels: the loss stands on the answers, and only there."""

import pytest

from ktops.cli.encoding import IGNORED, encode, prepare_tokenizer
from ktops.cli.errors import UserError

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Where does Mira live?"},
    {"role": "assistant", "content": "In the mill."},
    {"role": "user", "content": "And Leo?"},
    {"role": "assistant", "content": "In the tower."},
]
CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
LAST_DIFFERS = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ 'hm, ' }}{% endif %}"
    "{{ m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def learned(example: dict, tokenizer) -> str:
    return tokenizer.decode([label for label in example["labels"] if label != IGNORED])


@pytest.fixture
def fresh_tokenizer(tokenizer):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    return tokenizer


def test_default_template_reads_like_the_alpaca_prompt(fresh_tokenizer):
    prepare_tokenizer(fresh_tokenizer)
    end = fresh_tokenizer.eos_token
    (example,) = encode([TURNS], fresh_tokenizer, 1000).examples
    assert fresh_tokenizer.decode(example["input_ids"]) == (
        "### System:\nBe short.\n\n### Instruction:\nWhere does Mira live?\n\n### Response:\nIn the mill."
        + end
        + "\n\n"
        "### Instruction:\nAnd Leo?\n\n### Response:\nIn the tower." + end
    )
    assert learned(example, fresh_tokenizer) == f"In the mill.{end}In the tower.{end}"
    assert all(
        label in (IGNORED, token)
        for label, token in zip(example["labels"], example["input_ids"], strict=True)
    )


def test_chat_template_of_the_tokenizer_is_used(fresh_tokenizer):
    fresh_tokenizer.chat_template = CHATML
    prepare_tokenizer(fresh_tokenizer)
    end = fresh_tokenizer.eos_token
    (example,) = encode([TURNS[1:]], fresh_tokenizer, 1000).examples
    assert fresh_tokenizer.decode(example["input_ids"]).startswith("<user>Where does Mira live?" + end)
    assert learned(example, fresh_tokenizer) == f"In the mill.{end}In the tower.{end}"


def test_a_template_that_rewrites_earlier_answers_gives_an_example_for_each(fresh_tokenizer):
    fresh_tokenizer.chat_template = LAST_DIFFERS
    end = fresh_tokenizer.eos_token
    examples = encode([TURNS[1:]], fresh_tokenizer, 1000).examples
    assert [learned(example, fresh_tokenizer) for example in examples] == [
        f"hm, In the mill.{end}",
        f"hm, In the tower.{end}",
    ]


def test_long_examples_are_cut_and_those_without_an_answer_left_are_dropped(fresh_tokenizer):
    prepare_tokenizer(fresh_tokenizer)
    (whole,) = encode([TURNS[1:3]], fresh_tokenizer, 1000).examples
    answer = next(i for i, label in enumerate(whole["labels"]) if label != IGNORED)
    cut = encode([TURNS[1:3]], fresh_tokenizer, answer + 1)
    assert (cut.truncated, cut.dropped) == (1, 0)
    assert cut.examples[0] == {name: values[: answer + 1] for name, values in whole.items()}
    gone = encode([TURNS[1:3]], fresh_tokenizer, answer)
    assert (gone.examples, gone.dropped) == ([], 1)


def test_tokenizer_without_end_token_is_refused(fresh_tokenizer):
    fresh_tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        prepare_tokenizer(fresh_tokenizer)


def test_template_errors_are_told(fresh_tokenizer):
    fresh_tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="roles system, user: no system role"):
        encode([TURNS[:3]], fresh_tokenizer, 1000)
