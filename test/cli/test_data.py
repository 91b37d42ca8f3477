"""The user's data file in JSON or JSONL, and the messages for a broken one."""

import json

import pytest

from ktops.cli.errors import UserError
from ktops.cli.finetune.datasets import load_examples

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
def test_layouts_are_recognized_in_json_and_jsonl(tmp_path, text):
    examples = load_examples(str(write(tmp_path / "data", text)))
    assert [example.messages for example in examples] == [ALPACA_CONVERSATION, MESSAGES["messages"]]


def test_blank_lines_and_line_separators_inside_strings_are_no_lines(tmp_path):
    record = {"instruction": "a\u2028b", "output": "c"}
    text = "\n" + json.dumps(record, ensure_ascii=False) + "\n\n"
    (example,) = load_examples(str(write(tmp_path / "data.jsonl", text)))
    assert example.messages[0]["content"] == "a\u2028b"
    assert example.where == f"{tmp_path / 'data.jsonl'}, line 2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data is empty"),
        ("  \n\n", "data is empty"),
        ("\ufeff\r\n", "data is empty"),
        ("[]", "data is empty"),
        ("\n [\n ]\n", "data is empty"),
        ("{}", "data, line 1: the record is empty"),
        ("[{}]", "data, example 1: the record is empty"),
        (lines(ALPACA, {"text": None}), "data, line 2: the record is empty"),
        ('{"text": "a", "text": "b"}', "data, line 1: an object has the key 'text' twice"),
        ('[{"text": "a", "text": "b"}]', "data: an object has the key 'text' twice"),
        (lines(ALPACA) + "{broken\n", r"data, line 2: not valid JSON"),
        ("[\n{},\n{]", r"data, line 3: not valid JSON"),
        (
            lines(ALPACA, {"prompt": "x", "chosen": "y"}),
            r"data, line 2: unknown layout with the keys \['chosen', 'prompt'\]\. Known layouts: messages",
        ),
        (json.dumps([ALPACA, {"q": 1}]), r"data, example 2: unknown layout with the keys \['q'\]"),
        (lines([1]), "example 1: expected a JSON object, got 1"),
        (lines("text"), 'line 1: expected a JSON object, got "text"'),
        (
            lines({"instruction": "a", "output": 3}),
            "line 1: the content of a message must be a string or a list of text parts, got 3",
        ),
        (lines({"instruction": "a", "output": ""}), "line 1: nothing to train on"),
        (
            lines({"instruction": 1, "input": "x", "output": "b"}),
            "line 1: instruction must be a string, got 1",
        ),
        (lines({"instruction": "a", "output": "b", "history": ["x"]}), "line 1: history must be a list"),
        (lines({"instruction": "a", "output": "b", "history": "x"}), "line 1: history must be a list"),
        (lines({"messages": "hi"}), "line 1: messages must be a list, got str"),
        (
            lines({"messages": [{"speaker": "human", "text": "x"}]}),
            r"role and content, got \['speaker', 'text'\]",
        ),
        (lines({"messages": [{"role": "user"}]}), r"role and content, got \['role'\]"),
        (lines({"messages": [{"role": "assistant", "content": None}]}), r"got \['content', 'role'\]"),
        (lines({"messages": [{"role": "bot", "content": "x"}]}), "role must be one of .*, got 'bot'"),
        (lines({"messages": [{"role": "user", "content": "x"}]}), "line 1: nothing to train on"),
        (lines({"messages": []}), "line 1: nothing to train on"),
    ],
)
def test_broken_data_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_examples(str(write(tmp_path / "data", text)))


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match=r"no such file: .*nowhere\.json"):
        load_examples(str(tmp_path / "nowhere.json"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a JSON or JSONL file in UTF-8"):
        load_examples(str(tmp_path / "binary"))
