"""Tokens and labels: the loss covers only the answers."""

import pytest

from ktops.cli.errors import UserError
from ktops.cli.finetune.encoding import IGNORED, encode, encode_question, prepare_tokenizer
from ktops.cli.finetune.layouts import Conversation, PlainText

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


GLM = (
    "{% for m in messages %}{{ {'tool': '<|observation|>'}.get(m.role, '<|' + m.role + '|>') }}"
    "{% if loop.last and m.reasoning_content %}{{ '\\n<think>' + m.reasoning_content }}{% endif %}"
    "{{ '\\n' + m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
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
    (example,) = encode([Conversation(TURNS)], fresh_tokenizer, 1000).examples
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
    (example,) = encode([Conversation(TURNS[1:])], fresh_tokenizer, 1000).examples
    assert fresh_tokenizer.decode(example["input_ids"]).startswith("<user>Where does Mira live?" + end)
    assert learned(example, fresh_tokenizer) == f"In the mill.{end}In the tower.{end}"


def test_a_template_that_rewrites_earlier_answers_gives_an_example_for_each(fresh_tokenizer):
    fresh_tokenizer.chat_template = LAST_DIFFERS
    end = fresh_tokenizer.eos_token
    examples = encode([Conversation(TURNS[1:])], fresh_tokenizer, 1000).examples
    assert [learned(example, fresh_tokenizer) for example in examples] == [
        f"hm, In the mill.{end}",
        f"hm, In the tower.{end}",
    ]


@pytest.mark.parametrize("turns", [3, 5, 7])
def test_a_turn_that_the_heading_of_the_next_one_ends(fresh_tokenizer, turns):
    """GLM's template writes nothing after an answer; the model stops with the header of another turn."""
    headings = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    fresh_tokenizer.add_special_tokens({"additional_special_tokens": headings})
    fresh_tokenizer.chat_template = GLM
    call = {"type": "function", "function": {"name": "find", "arguments": {}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    messages = [*TURNS[:4], asked, {"role": "tool", "content": "tower"}, TURNS[4]][:turns]
    (example,) = encode([Conversation(messages)], fresh_tokenizer, 1000).examples
    answers = ["\nIn the mill.<|user|>", '\n{"name": "find", "arguments": {}}<|observation|>']
    answers = [*answers, "\nIn the tower.<|user|>"][: (turns - 1) // 2]
    assert learned(example, fresh_tokenizer) == "".join(answers)
    assert len(example["input_ids"]) == len(example["labels"]) == len(example["attention_mask"])
    assert example["labels"][-1] == example["input_ids"][-1]
    messages = [*TURNS[:2], {**TURNS[2], "reasoning_content": "hm"}]
    (example,) = encode([Conversation(messages)], fresh_tokenizer, 1000).examples
    assert learned(example, fresh_tokenizer) == "\n<think>hm\nIn the mill.<|user|>"


def test_long_examples_are_cut_and_those_without_an_answer_left_are_dropped(fresh_tokenizer):
    prepare_tokenizer(fresh_tokenizer)
    (whole,) = encode([Conversation(TURNS[1:3])], fresh_tokenizer, 1000).examples
    answer = next(i for i, label in enumerate(whole["labels"]) if label != IGNORED)
    cut = encode([Conversation(TURNS[1:3])], fresh_tokenizer, answer + 1)
    assert (cut.truncated, cut.dropped) == (1, 0)
    assert cut.examples[0] == {name: values[: answer + 1] for name, values in whole.items()}
    gone = encode([Conversation(TURNS[1:3])], fresh_tokenizer, answer)
    assert (gone.examples, gone.dropped) == ([], 1)


def test_of_plain_text_everything_is_learned_and_of_a_prompt_nothing(fresh_tokenizer):
    end = fresh_tokenizer.eos_token
    text = "Mira lives in the mill."
    for example, answer in (
        (PlainText("", text), text + end),
        (PlainText("", text + end), text + end),
        (PlainText(text[:10], text[10:]), text[10:] + end),
    ):
        (tokens,) = encode([example], fresh_tokenizer, 1000).examples
        assert fresh_tokenizer.decode(tokens["input_ids"]) == text + end
        assert learned(tokens, fresh_tokenizer) == answer
        assert tokens["attention_mask"] == [1] * len(tokens["input_ids"])


def test_a_token_that_holds_the_end_of_the_prompt_and_the_beginning_of_the_answer_is_learned(fresh_tokenizer):
    ids = fresh_tokenizer(" the")["input_ids"]
    assert len(ids) == 1
    (tokens,) = encode([PlainText("in t", "he mill")], fresh_tokenizer, 1000).examples
    assert learned(tokens, fresh_tokenizer) == " the mill" + fresh_tokenizer.eos_token


def with_bos_and_eos(tokenizer):
    """Makes the tokenizer prepend a token like Llama's, or also append one to every text."""
    from tokenizers.processors import TemplateProcessing

    token, number = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A {token}", special_tokens=[(token, number)]
    )
    return tokenizer


def test_plain_text_has_the_special_tokens_of_the_tokenizer_once(fresh_tokenizer):
    tokenizer = with_bos_and_eos(fresh_tokenizer)
    end = tokenizer.eos_token
    (tokens,) = encode([PlainText("Mira", " lives")], tokenizer, 1000).examples
    assert tokenizer.decode(tokens["input_ids"]) == f"{end}Mira lives{end}"
    assert learned(tokens, tokenizer) == f" lives{end}"
    assert tokenizer.decode(encode_question(PlainText("Mira", " lives"), tokenizer)) == f"{end}Mira"


def test_questions_that_samples_answer(fresh_tokenizer):
    prepare_tokenizer(fresh_tokenizer)
    example = Conversation(TURNS[1:])
    assert example.question == "And Leo?"
    prompt = fresh_tokenizer.decode(encode_question(example, fresh_tokenizer))
    assert prompt.endswith("### Instruction:\nAnd Leo?\n\n### Response:\n")
    assert encode_question(PlainText("", "Mira lives."), fresh_tokenizer) == []


def test_answers_of_a_prompt_are_not_learned(fresh_tokenizer):
    prepare_tokenizer(fresh_tokenizer)
    (example,) = encode([Conversation(TURNS, first=4)], fresh_tokenizer, 1000).examples
    assert learned(example, fresh_tokenizer) == f"In the tower.{fresh_tokenizer.eos_token}"


def test_tokenizer_without_end_token_is_refused(fresh_tokenizer):
    fresh_tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        prepare_tokenizer(fresh_tokenizer)


def test_template_errors_are_told(fresh_tokenizer):
    fresh_tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="roles system, user: no system role"):
        encode([Conversation(TURNS[:3])], fresh_tokenizer, 1000)
