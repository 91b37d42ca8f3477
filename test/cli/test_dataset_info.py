"""Data sets described by a dataset_info.json: which records become which examples, and which mistakes are
found."""

import json

import pytest

from ktops.cli.errors import UserError
from ktops.cli.finetune.datasets import load_examples, with_absolute_paths
from ktops.cli.finetune.layouts import Conversation


@pytest.fixture
def directory(tmp_path):
    """Returns ``make(info, **files)``, which writes dataset_info.json and files of records."""

    def make(info: object, **files: list) -> str:
        text = info if isinstance(info, str) else json.dumps(info)
        (tmp_path / "dataset_info.json").write_text(text)
        for name, records in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(records))
        return str(tmp_path)

    return make


def messages_of(examples) -> list[list[tuple[str, str]]]:
    assert all(isinstance(example, Conversation) for example in examples)
    return [[(message["role"], message["content"]) for message in example.messages] for example in examples]


def test_alpaca_without_columns(directory):
    records = [
        {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "unused", "source": "unused"},
        {"instruction": "Greet.", "input": "", "output": "Hi."},
    ]
    examples = load_examples("math", directory({"math": {"file_name": "a.json"}}, a=records))
    assert messages_of(examples) == [
        [("user", "Add.\n1 + 1"), ("assistant", "2")],
        [("user", "Greet."), ("assistant", "Hi.")],
    ]


def test_alpaca_with_columns(directory):
    columns = {"prompt": "q", "response": "a", "system": "s", "history": "h"}
    info = {"faq": {"file_name": "a.json", "columns": columns}}
    records = [{"q": "Why?", "a": "So.", "s": "Be brief.", "h": [["Who?", "Me."]], "input": "unused"}]
    (messages,) = messages_of(load_examples("faq", directory(info, a=records)))
    assert messages == [
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "Me."),
        ("user", "Why?"),
        ("assistant", "So."),
    ]


def test_sharegpt_with_tools(directory):
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    info = {
        "tools": {
            "file_name": "a.json",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "tools": "functions"},
        }
    }
    turns = [
        {"from": "human", "value": "Rain?", "id": "unused"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "no"},
        {"from": "gpt", "value": "No."},
    ]
    functions = json.dumps([{"name": "weather"}])
    (example,) = load_examples("tools", directory(info, a=[{"conversations": turns, "functions": functions}]))
    assert [message["role"] for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert example.variables["tools"] == [{"type": "function", "function": {"name": "weather"}}]
    assert "id" not in example.messages[0]


TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "you", "assistant_tag": "me"}


def test_sharegpt_with_tags(directory):
    info = {
        "chat": {
            "file_name": "a.json",
            "formatting": "sharegpt",
            "columns": {"messages": "turns", "system": "rules"},
            "tags": {**TAGS, "system_tag": "rules"},
        }
    }
    turns = [{"role": "you", "content": "Hi."}, {"role": "me", "content": "Hello."}]
    with_rules = [{"role": "rules", "content": "Smile."}, *turns]
    records = [{"turns": turns, "rules": "Be kind."}, {"turns": with_rules, "rules": "overridden"}]
    answers = [("user", "Hi."), ("assistant", "Hello.")]
    assert messages_of(load_examples("chat", directory(info, a=records))) == [
        [("system", "Be kind."), *answers],
        [("system", "Smile."), *answers],
    ]


def test_several_data_sets_and_a_file(directory, tmp_path):
    def record(number):
        return {"instruction": str(number), "output": "yes"}

    files = {name: [record(10 * i + j) for j in range(10)] for i, name in enumerate("abc")}
    info = {"one": {"file_name": "a.json"}, "two": {"file_name": "b.json", "num_samples": 14}}
    where = directory(info, **files)
    examples = load_examples(f"one, two,{tmp_path / 'c.json'}", where, seed=1)
    numbers = [int(example.question) for example in examples]
    assert numbers[:10] == list(range(10)) and numbers[24:] == list(range(20, 30))
    assert set(numbers[10:20]) == set(range(10, 20)) and set(numbers[20:24]) <= set(range(10, 20))
    assert numbers[10:24] != sorted(numbers[10:24])
    few = load_examples("one,two", where, max_samples=3, seed=1)
    assert [int(example.question) for example in few] == [0, 1, 2, *numbers[10:13]]


def test_a_folder_of_files(directory, tmp_path):
    (tmp_path / "parts").mkdir()
    for name in ("b.json", "a.jsonl"):
        (tmp_path / "parts" / name).write_text(json.dumps({"instruction": name, "output": "yes"}))
    examples = load_examples("parts", directory({"parts": {"file_name": "parts"}}))
    assert [example.question for example in examples] == ["a.jsonl", "b.json"]
    (tmp_path / "parts" / "c.parquet").write_text("")
    with pytest.raises(UserError, match=r"c\.parquet: ktops finetune reads \.json and \.jsonl files"):
        load_examples("parts", str(tmp_path))


def test_files_become_absolute_and_names_stay(directory, tmp_path):
    where = directory({"name": {"file_name": "a.json"}, "b.json": {"file_name": "a.json"}}, a=[], b=[], c=[])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x, y.json").write_text("[]")
    folders = [tmp_path / "in", tmp_path]
    absolute = with_absolute_paths("name, b.json,c.json, nowhere", where, folders)
    assert absolute == f"name,b.json,{tmp_path / 'c.json'},nowhere"
    assert with_absolute_paths("x, y.json", where, folders) == str(tmp_path / "in" / "x, y.json")


GOOD = [{"instruction": "a", "output": "b"}]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hf_hub_url": "a/b"}, "hf_hub_url is not supported: download it"),
        ({"file_name": "a.json", "rankng": True}, "unknown key rankng; did you mean ranking?"),
        (
            {"file_name": "a.json", "ranking": True},
            "ranking is not supported: ktops finetune trains in stage sft",
        ),
        (
            {"file_name": "a.json", "columns": {"images": "i"}},
            "the column images is not supported: ktops finet",
        ),
        (
            {"file_name": "a.json", "columns": {"respones": "o"}},
            "unknown key respones; did you mean response?",
        ),
        (
            {"file_name": "a.json", "columns": {"prompt": "instruction"}},
            "columns: response is missing. ktops",
        ),
        ({"file_name": "a.json", "columns": {"response": 3}}, "columns must be an object of names"),
        (
            {"file_name": "a.json", "columns": {"response": "answer"}},
            "no record has the column 'answer' (response)",
        ),
        (
            {"file_name": "a.json", "formatting": "share"},
            "formatting must be one of alpaca, sharegpt, openai",
        ),
        (
            {"file_name": "a.json", "formatting": "sharegpt"},
            "no record has the column 'conversations' (messages)",
        ),
        ({"file_name": "a.json", "formatting": "sharegpt", "tags": {}}, "tags: role_tag is missing"),
        ({"file_name": "a.json", "split": "test"}, "split must be train, got 'test'"),
        ({"file_name": "a.json", "num_samples": 0}, "num_samples must be a positive number, got 0"),
        ({}, "file_name must name a file, got None"),
        ([], "expected an object with file_name, got []"),
        ({"file_name": "b.json"}, "no such file: "),
        ({"file_name": "a.csv"}, "a.csv: ktops finetune reads .json and .jsonl files"),
    ],
)
def test_wrong_descriptions(directory, entry, message):
    where = directory({"d": entry}, a=GOOD)
    with pytest.raises(UserError) as error:
        load_examples("d", where)
    assert message in str(error.value) and str(error.value).startswith("--data: ")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([3], "a.json, example 1: expected a JSON object, got 3"),
        ([{"turns": 3}], "a.json, example 1: turns must be a list, got 3"),
        ([{"turns": [{"who": "you"}]}], "every message needs the keys role and content, got {'who': 'you'}"),
        (
            [{"turns": [{"role": "system", "content": "x"}]}],
            "role must be one of you, me, got 'system'. The tags in",
        ),
    ],
)
def test_wrong_records(directory, records, message):
    entry = {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "turns"}, "tags": TAGS}
    with pytest.raises(UserError) as error:
        load_examples("d", directory({"d": entry}, a=records))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold an object, got list"),
        ('{"d": {}, "d": {}}', "an object has the key 'd' twice"),
    ],
)
def test_broken_info(directory, info, message):
    with pytest.raises(UserError, match=message):
        load_examples("d", directory(info))


def test_names_that_are_nowhere(directory, tmp_path):
    where = directory({"identity": {"file_name": "a.json"}}, a=GOOD)
    with pytest.raises(
        UserError, match=r"no such file: identify, and no such name in .*Did you mean identity\?"
    ):
        load_examples("identify", where)
    with pytest.raises(UserError, match=r"--data: no such file: identity; and no dataset_info\.json"):
        load_examples("identity")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--dataset-dir: no dataset_info\.json in"):
        load_examples("identity", str(tmp_path / "empty"))


def test_a_name_comes_before_a_file_of_this_name(directory, tmp_path, monkeypatch):
    where = directory({"d": {"file_name": "a.json"}}, a=GOOD)
    (tmp_path / "d").write_text('{"text": "from the file"}')
    monkeypatch.chdir(tmp_path)
    assert [example.question for example in load_examples("d", where)] == ["a"]
    assert with_absolute_paths("d", where, [tmp_path]) == "d"
