"""Chat templates render everything in a conversation, or an error names what they leave out.

The templates are short versions of published ones: Qwen3 (reasoning of the last turn only), DeepSeek-V3
(arguments as text), gpt-oss (one call, reasoning dropped once answered), Llama 3.1 (no text with a call) and
models without tools.
"""

import copy

import pytest

from ktops.cli.errors import UserError
from ktops.cli.finetune.encoding import IGNORED, encode
from ktops.cli.finetune.layouts import read_record
from ktops.cli.finetune.rendering import CHAT_TEMPLATE, answers

CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
QWEN = """
{%- if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- set reasoning = m.reasoning_content if m.reasoning_content is string else '' %}
{%- if not reasoning and '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1] %}
{%- endif %}
{{- '<' + m.role + '>' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<think>' + reasoning + '</think>' }}
{%- endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}
{{- '<call>' + call.function.name + call.function.arguments | tojson + '</call>' }}
{%- endfor %}
{{- '<end>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<assistant>' }}{% if enable_thinking is false %}{{ '<think></think>' }}{% endif %}
{%- endif %}"""
DEEPSEEK = """
{%- for m in messages %}
{{- '<' + m.role + '>' + m.content.split('</think>')[-1] }}
{%- for call in m.tool_calls or [] %}
{{- '<call>' + call.type + ' ' + call.function.name + ' ' + call.function.arguments }}
{%- endfor %}{{ '<end>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant><think>' }}{% endif %}"""
GPT_OSS = """
{%- for m in messages %}
{%- set later = messages[loop.index:] | selectattr('role', 'equalto', 'assistant') | list %}
{%- set reasoning = m.reasoning_content or m.thinking %}
{%- if reasoning and not later %}{{ '<assistant>analysis: ' + reasoning + '<end>' }}{% endif %}
{{- '<' + m.role + '>' }}
{%- if m.tool_calls %}{{ m.tool_calls[0].function.name + m.tool_calls[0].function.arguments | tojson }}
{%- else %}{{ m.content }}{% endif %}{{ '<end>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
LLAMA = """
{%- for m in messages %}
{{- '<' + m.role + '>' }}
{%- if 'tool_calls' in m %}{{ m.tool_calls[0].function | tojson }}
{%- else %}{{ m['content'] | trim }}{% endif %}
{{- '<end>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
PRINTED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call.function.name }}{{ call.function.arguments }}{% endfor %}"
    "{{ '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

USER = {"role": "user", "content": "Rain?"}
ANSWER = {"role": "assistant", "content": "Yes."}
MORE = {"role": "user", "content": "Sure?"}
FUNCTION = {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": FUNCTION}],
}
TWO_CALLS = {**CALL, "tool_calls": CALL["tool_calls"] * 2}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "wet"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
WRITTEN = '<call>weather{"city": "Oslo", "days": 2}</call><end>'
FIRST, SECOND = ({**m, "reasoning_content": t} for m, t in ((CALL, "Look."), (ANSWER, "Wet.")))


@pytest.fixture
def learn(tokenizer):
    """``learn(template, messages, **record) -> [(text, learned text)]`` for the examples of one record."""
    tokenizer = copy.deepcopy(tokenizer)

    def run(template, messages, **record):
        tokenizer.chat_template = template
        example = read_record({"messages": messages, **record}, "data.jsonl, line 7")
        return [
            (
                tokenizer.decode(tokens["input_ids"]),
                tokenizer.decode([i for i in tokens["labels"] if i != IGNORED]),
            )
            for tokens in encode([example], tokenizer, 10_000).examples
        ]

    return run


def learned(examples) -> list[str]:
    return [answer for _, answer in examples]


def test_a_turn_with_a_call_only_is_trained_as_the_template_writes_it(learn):
    ((text, answer),) = learn(QWEN, [USER, CALL], tools=TOOLS)
    assert answer == "<think></think>" + WRITTEN
    assert text.startswith(
        '<tools>{"type": "function", "function": {"name": "weather", "parameters": {}}}</tools>'
    )


def test_reasoning_of_every_turn_is_trained_though_the_template_leaves_earlier_ones_out(learn):
    turn = {**ANSWER, "reasoning_content": "Clouds."}
    examples = learn(QWEN, [USER, turn, MORE, turn])
    assert learned(examples) == ["<think>Clouds.</think>Yes.<end>"] * 2
    assert examples[1][0].count("Clouds.") == 1


def test_calls_and_answer_after_one_question_are_one_example(learn):
    (answer,) = learned(learn(QWEN, [USER, FIRST, RESULT, SECOND], tools=TOOLS))
    assert answer == f"<think>Look.</think>{WRITTEN}<think>Wet.</think>Yes.<end>"


def test_keys_without_a_value_are_absent(learn):
    turn = {**ANSWER, "tool_calls": [], "reasoning_content": "", "refusal": None, "audio": None}
    assert learn(CHATML, [USER, turn], tools=None) == learn(CHATML, [USER, ANSWER])
    assert learn(LLAMA, [USER, turn]) == learn(LLAMA, [USER, ANSWER])


def test_arguments_as_text_and_missing_content_as_an_empty_string_where_the_template_wants_it(learn):
    written = '<call>function weather {"city": "Oslo", "days": 2}<end>'
    assert learned(learn(DEEPSEEK, [USER, CALL, RESULT, ANSWER])) == [
        f"<assistant>{written}<assistant>Yes.<end>"
    ]
    assert learned(learn(PRINTED, [USER, CALL])) == ['weather{"city": "Oslo", "days": 2}<end>']


class NullContent:
    """A tokenizer with DeepSeek-R1's template, which writes calls only if the content is null."""

    chat_template, special_tokens_map = "", {}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        texts = [
            m["content"] or "{name} {arguments}".format(**m["tool_calls"][0]["function"])
            for m in messages
            if m["content"] is None or "tool_calls" not in m
        ]
        return "|".join([*texts, ""])


def test_a_call_with_null_as_content_where_the_template_wants_it():
    (answer,) = answers(read_record({"messages": [USER, CALL]}, "here"), NullContent())
    assert answer.text[answer.start :] == 'weather {"city": "Oslo", "days": 2}|'


def test_an_answer_begins_where_the_template_begins_it_though_it_rewrites_the_prompt(learn):
    examples = learn(GPT_OSS, [USER, FIRST, RESULT, SECOND])
    assert learned(examples) == [
        'analysis: Look.<end><assistant>weather{"city": "Oslo", "days": 2}<end>',
        "analysis: Wet.<end><assistant>Yes.<end>",
    ]
    assert "Look." not in examples[1][0]


def test_the_first_message_can_be_an_answer(learn):
    assert learned(learn(CHATML, [ANSWER, USER, ANSWER])) == ["Yes.<end>Yes.<end>"]
    (answer,) = learned(learn(CHATML, [{"role": "assistant", "content": "Zebras."}]))
    assert answer == "Zebras.<end>"


def test_parts_of_text(learn):
    parts = [{"type": "text", "text": "Ra"}, {"type": "text", "text": "in?"}]
    assert (
        learn(CHATML, [{**USER, "content": parts[:1]}, ANSWER])[0][0] == "<user>Ra<end><assistant>Yes.<end>"
    )
    template = CHATML.replace(
        "m.content", "(m.content if m.content is string else m.content | join('', 'text'))"
    )
    assert learn(template, [{**USER, "content": parts}, ANSWER]) == learn(CHATML, [USER, ANSWER])


def test_variables_of_the_template(learn):
    template = "{% for d in documents or [] %}{{ '[' + d.text + ']' }}{% endfor %}{{ style or '' }}" + CHATML
    ((text, _),) = learn(
        template, [USER, ANSWER], documents=[{"text": "Doc"}], chat_template_kwargs={"style": "x"}
    )
    assert text.startswith("[Doc]x<user>")
    assert learned(learn(QWEN, [USER, ANSWER], enable_thinking=False)) == ["Yes.<end>"]


def test_ids_are_needed_only_where_results_are_out_of_order(learn):
    second = {"id": "c2", "type": "function", "function": {**FUNCTION, "name": "wind"}}
    calls = {**CALL, "tool_calls": [*CALL["tool_calls"], second]}
    other = {**RESULT, "tool_call_id": "c2", "name": "wind", "content": "calm"}
    assert len(learn(QWEN, [USER, calls, RESULT, other, SECOND])) == 2
    with pytest.raises(
        UserError, match=r"leaves out tool_call_id of message 3 .*, name of message 3 .*of message 4"
    ):
        learn(QWEN, [USER, calls, other, RESULT, SECOND])
    with pytest.raises(UserError, match=r"leaves out name of message 1 \(user\)"):
        learn(QWEN, [{**USER, "name": "Mira"}, ANSWER])


@pytest.mark.parametrize(
    ("template", "messages", "record", "missing", "keys"),
    [
        (CHATML, [USER, CALL], {}, ["tool_calls of message 2 (assistant)"], "tool_calls"),
        (CHATML, [USER, CALL], {"tools": TOOLS}, ["tool_calls of message 2", "tools"], "tool_calls,tools"),
        (CHATML, [USER, ANSWER], {"tools": TOOLS}, ["tools"], "tools"),
        (CHATML, [USER, SECOND], {}, ["reasoning_content of message 2 (assistant)"], "reasoning_content"),
        (CHATML, [USER, SECOND], {"id": 3}, ["reasoning_content of message 2", "id"], "id,reasoning_content"),
        (CHATML, [USER, {**ANSWER, "weight": 0}], {}, ["weight of message 2 (assistant)"], "weight"),
        (QWEN, [USER, ANSWER], {"tokenize": 1, "eos_token": "x"}, ["tokenize, eos_token"], "eos_token,tok"),
        (GPT_OSS, [USER, TWO_CALLS], {}, ["tool_calls of message 2 (assistant)"], "tool_calls"),
        (GPT_OSS, [USER, {**CALL, "content": "Hm."}], {}, ["content of message 2 (assistant)"], None),
        (LLAMA, [USER, {**CALL, "content": "Hm."}], {}, ["content of message 2 (assistant)"], None),
        (LLAMA, [{**USER, "content": [{"type": "text", "text": t} for t in "ab"]}, ANSWER], {},
         ["content, a list of parts, of message 1 (user)"], None),
        (DEEPSEEK, [USER, {**ANSWER, "content": "<think>a</think>b"}], {}, ["content of message 2"], None),
        (CHATML.replace("m.content", "(m.content if m.role in ['user', 'assistant'] else '')"),
         [{**USER, "role": "developer"}, USER, ANSWER], {}, ["content of message 1 (developer)"], None),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out_is_named(learn, template, messages, record, missing, keys):
    with pytest.raises(UserError) as error:
        learn(template, messages, **record)
    text = str(error.value)
    assert text.startswith(
        "--data: data.jsonl, line 7: the chat template of the model leaves out " + missing[0]
    )
    assert all(name in text for name in missing) and "chat_template.jinja" in text
    assert ("--ignore-keys" in text) == (keys is not None) and f"--ignore-keys {keys or ''}" * bool(
        keys
    ) in text


def test_the_headings_of_alpaca_write_no_calls(learn):
    with pytest.raises(
        UserError, match=r"the model has no chat template, and .* leave out tool_calls of message 2"
    ):
        learn(CHAT_TEMPLATE, [USER, CALL, RESULT, ANSWER])


def test_the_reason_of_a_template_that_refuses(learn):
    template = "{% if messages[-1].role == 'tool' %}{{ raise_exception('no results') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r"line 7: .* roles user, assistant, tool: no results"):
        learn(template, [USER, CALL, RESULT, ANSWER])
