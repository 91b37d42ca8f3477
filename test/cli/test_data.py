"""The user's data file: both layouts, and what is said about a broken one."""

import json

import pytest

from ktops.cli.data import load_conversations
from ktops.cli.errors import UserError

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
ALPACA_CONVERSATION = [
    {"role": "user", "content": "Add.\n\n1 and 2"},
    {"role": "assistant", "content": "3"},
]


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("text", [json.dumps([ALPACA, MESSAGES], indent=1), lines(ALPACA, MESSAGES)])
def test_layouts_are_recognised_in_json_and_jsonl(tmp_path, text):
    conversations = load_conversations(write(tmp_path / "data", text))
    assert conversations == [ALPACA_CONVERSATION, MESSAGES["messages"]]


def test_alpaca_system_and_history_become_earlier_messages(tmp_path):
    record = {"instruction": "B?", "output": "b", "system": "Be short.", "history": [["A?", "a"]]}
    (conversation,) = load_conversations(write(tmp_path / "data.jsonl", lines(record)))
    assert [(m["role"], m["content"]) for m in conversation] == [
        ("system", "Be short."),
        ("user", "A?"),
        ("assistant", "a"),
        ("user", "B?"),
        ("assistant", "b"),
    ]


def test_blank_lines_and_line_separators_inside_strings_are_no_lines(tmp_path):
    record = {"instruction": "a\u2028b", "output": "c"}
    text = "\n" + json.dumps(record, ensure_ascii=False) + "\n\n"
    (conversation,) = load_conversations(write(tmp_path / "data.jsonl", text))
    assert conversation[0]["content"] == "a\u2028b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data is empty"),
        ("  \n\n", "data is empty"),
        (lines(ALPACA) + "{broken\n", r"data, line 2: not valid JSON"),
        ("[\n{},\n{]", r"data, line 3: not valid JSON"),
        (
            lines(ALPACA, {"text": "x", "id": 1}),
            r"data, line 2: unknown layout with the keys \['id', 'text'\]",
        ),
        (json.dumps([ALPACA, {"q": 1}]), r"data, example 2: unknown layout with the keys \['q'\]"),
        (lines([1]), "example 1: expected a JSON object, got 1"),
        (lines("text"), 'line 1: expected a JSON object, got "text"'),
        (
            lines({"instruction": "a", "output": 3}),
            "line 1: the content of a message must be a string, got 3",
        ),
        (lines({"instruction": "a", "output": ""}), "line 1: there is no answer to learn"),
        (
            lines({"instruction": 1, "input": "x", "output": "b"}),
            "line 1: instruction must be a string, got 1",
        ),
        (lines({"instruction": "a", "output": "b", "history": ["x"]}), "line 1: history must be a list"),
        (lines({"messages": "hi"}), "line 1: messages must be a list, got str"),
        (
            lines({"messages": [{"from": "human", "value": "x"}]}),
            r"role and content, got \['from', 'value'\]",
        ),
        (lines({"messages": [{"role": "bot", "content": "x"}]}), "role must be one of .*, got 'bot'"),
        (lines({"messages": [{"role": "user", "content": "x"}]}), "line 1: there is no answer to learn"),
        (lines({"messages": []}), "line 1: there is no answer to learn"),
    ],
)
def test_broken_data_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_conversations(write(tmp_path / "data", text))


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*nowhere\.json"):
        load_conversations(tmp_path / "nowhere.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a JSON or JSONL file in UTF-8"):
        load_conversations(tmp_path / "binary")
