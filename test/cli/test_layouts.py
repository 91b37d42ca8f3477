"""Records in the layouts of trainers, and the examples made from them."""

import json

import pytest

from ktops.cli.errors import UserError
from ktops.cli.finetune.layouts import Conversation, PlainText, read_record

USER = {"role": "user", "content": "Rain?"}
ANSWER = {"role": "assistant", "content": "Yes."}
SCHEMA = {"name": "weather", "description": "Now", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def read(record, *ignored):
    return read_record(record, "here", ignored)


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
        (
            {"conversations": [{"from": "human", "value": "Rain?"}, {"from": "gpt", "value": "Yes."}]},
            [USER, ANSWER],
        ),
        ({"messages": [{"from": "user", "value": "Rain?"}, ANSWER]}, [USER, ANSWER]),
        ({"messages": [USER, ANSWER], "text": None, "system": "", "tools": []}, [USER, ANSWER]),
        (
            {"instruction": "B?", "output": "b", "system": "Be short.", "history": [["A?", "a"]]},
            [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "A?"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "B?"},
                {"role": "assistant", "content": "b"},
            ],
        ),
        (
            {"conversations": [USER, ANSWER], "system": "Be short."},
            [{"role": "system", "content": "Be short."}, USER, ANSWER],
        ),
    ],
)  # fmt: skip
def test_conversations(record, messages):
    assert read(record) == Conversation(messages, where="here")


def test_calls_and_results_of_sharegpt():
    """Follows LLaMA-Factory's data README, where tools and calls are JSON text."""
    record = {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {
                "from": "function_call",
                "value": json.dumps({"name": "weather", "arguments": {"city": "Oslo"}}),
            },
            {"from": "observation", "value": '{"rain": true}'},
            {"from": "gpt", "value": "Yes."},
        ],
        "system": "Be short.",
        "tools": json.dumps([SCHEMA]),
    }
    assert read(record) == Conversation(
        [
            {"role": "system", "content": "Be short."},
            USER,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"rain": true}'},
            ANSWER,
        ],
        {"tools": [TOOL]},
        where="here",
    )


def test_several_calls_after_reasoning_in_one_turn_of_sharegpt():
    calls = [{"name": "weather", "arguments": {"city": city}} for city in ("Oslo", "Rome")]
    value = "<think>\nBoth.\n</think>\n\n" + json.dumps(calls)
    turn = read({"conversations": [USER, {"from": "function_call", "value": value}]}).messages[1]
    assert turn["content"] == "<think>\nBoth.\n</think>"
    assert [call["function"]["arguments"]["city"] for call in turn["tool_calls"]] == ["Oslo", "Rome"]


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"name": "weather", "arguments": {"city": "Oslo"}},
        {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}, "index": None},
    ],
)
def test_calls_have_one_form(call):
    turn = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": {}}
    assert read({"messages": [USER, turn]}).messages[1] == {"role": "assistant", "tool_calls": [CALL]}


def test_prompt_and_completion():
    assert read({"prompt": "Mira ", "completion": "lives"}) == PlainText("Mira ", "lives", "here")
    assert read({"prompt": "", "completion": "lives"}) == PlainText("", "lives", "here")
    record = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "system": "Be short."}
    example = read(record)
    assert example.messages == [{"role": "system", "content": "Be short."}, USER, ANSWER, USER, ANSWER]
    assert example.messages[example.first :] == [ANSWER]


def test_text():
    assert read({"text": "Mira lives."}) == PlainText("", "Mira lives.", "here")


def test_what_the_template_gets_beside_the_messages():
    record = {
        "tools": [SCHEMA],
        "documents": [{"text": "a"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    example = read({"messages": [USER, ANSWER], **record})
    assert example.variables == {"tools": [TOOL], "documents": [{"text": "a"}], "enable_thinking": False}


def test_ignored_keys_of_records_messages_parts_and_calls():
    part = {"type": "text", "text": "Rain?", "note": 1}
    call = {**CALL, "note": 1, "function": {**CALL["function"], "note": 1}}
    record = {
        "messages": [
            {"role": "user", "content": [part], "note": 1},
            {"role": "assistant", "tool_calls": [call], "note": 1},
        ],
        "note": 1,
    }
    assert read(record, "note").messages == [
        {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
        {"role": "assistant", "tool_calls": [CALL]},
    ]
    assert read({"text": "a", "messages": [USER, ANSWER]}, "text").messages == [USER, ANSWER]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [USER, ANSWER], "text": "a"},
            "the record has 2 layouts, messages and text.*--ignore-keys text",
        ),
        (
            {"instruction": "a", "output": "b", "prompt": "a", "completion": "b"},
            "2 layouts, alpaca and prompt and completion.*--ignore-keys completion,prompt",
        ),
        ({"text": "a", "id": 1}, r"the layout text does not use the keys \['id'\].*--ignore-keys id"),
        ({"prompt": "a", "completion": "b", "label": True}, "the layout prompt and completion .*'label'"),
        ({"prompt": "a", "completion": [ANSWER]}, "completion must be a string, got"),
        ({"prompt": [USER], "completion": "b"}, "completion must be a list, or both strings, got str"),
        ({"prompt": [USER, ANSWER], "completion": [USER]}, "nothing to train on"),
        ({"prompt": "a", "completion": " "}, r"nothing to train on \(completion is empty\)"),
        ({"text": ""}, r"nothing to train on \(text is empty\)"),
        ({"text": 3}, "text must be a string, got 3"),
        (
            {"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"},
            "both a system message and the key system.*--ignore-keys system",
        ),
        ({"messages": [USER, ANSWER], "system": 3}, "system must be a string, got 3"),
        ({"messages": [USER, ANSWER], "tools": "weather"}, "tools is not valid JSON .*'weather'"),
        ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "tools must be a list of JSON schemas, got"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": 1}, "chat_template_kwargs must be an object"),
        ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "tool_calls must be a list of calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "a call must be .* got {'id'"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{city"}]}]},
            "arguments of f is not valid JSON .*'{city'",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            r"arguments of f must be a JSON object, got \[1\]",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "extra": 1}]}]},
            r"unknown keys \['extra'\].*--ignore-keys extra",
        ),
        (
            {"conversations": [USER, {"from": "function_call", "value": "weather()"}]},
            "the value of function_call is not valid JSON .*'weather\\(\\)'",
        ),
        ({"conversations": [USER, {"from": "function_call", "value": "3"}]}, "a call must be .* got 3"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, ANSWER]},
            "a part of a message's content must be {type: text, text: a string}, got {'type': 'image'",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(record, message):
    with pytest.raises(UserError, match=f"--data: here: .*{message}"):
        read(record)
