"""`ktops finetune config.yaml` beside LLaMA-Factory: the same keys, defaults and conversations."""

import json
from dataclasses import MISSING, fields

import pytest
from llamafactory.data.converter import get_dataset_converter
from llamafactory.data.parser import get_dataset_list
from llamafactory.hparams import DataArguments, FinetuningArguments, ModelArguments
from llamafactory.hparams.training_args import TrainingArguments

from ktops.cli.finetune.config_keys import DEFAULTS, KEYS
from ktops.cli.finetune.datasets import load_examples
from ktops.cli.finetune.options import Options

OWN = {
    "dtype", "torch_dtype", "evaluation_strategy", "group_by_length",
    "ignore_keys", "experts_implementation", "weight_format", "group_size", "quantize_method",
}  # fmt: skip
"""Keys of other versions of transformers and LLaMA-Factory, and those of ktops."""

THEIRS = {
    key: None if field.default is MISSING else field.default
    for arguments in (ModelArguments, DataArguments, FinetuningArguments, TrainingArguments)
    for key, field in {field.name: field for field in fields(arguments)}.items()
}
"""Key of LLaMA-Factory -> its default."""


def test_keys():
    assert KEYS.keys() - THEIRS.keys() == OWN


DIFFERENT = {
    "bf16": "ktops finetune trains in bf16 if no key says otherwise",
    "dataset_dir": "a dataset_info.json beside the file comes first",
    "disable_gradient_checkpointing": "activations are kept if no key says otherwise",
    "do_train": "it may be left out",
    "logging_steps": "every step is recorded",
    "overwrite_output_dir": "a flag of the command, not an option of the run",
    "per_device_eval_batch_size": "per_device_train_batch_size if it is left out",
}
"""Keys whose defaults differ, and why."""

SAME = sorted(
    key for key in KEYS.keys() & THEIRS.keys() - DIFFERENT.keys() if THEIRS[key] not in (None, "", [])
)


@pytest.mark.parametrize("key", SAME)
def test_defaults(key):
    """LLaMA-Factory's default is accepted, and sets what a file without the key sets."""
    default = getattr(THEIRS[key], "value", THEIRS[key])
    options = KEYS[key](default)
    assert options == {name: DEFAULTS.get(name, getattr(Options(), name)) for name in options}


CALL = {"name": "weather", "arguments": {"city": "Rome"}}
TOOLS = [{"name": "weather", "parameters": {}}]
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "you", "assistant_tag": "me"}
TURNS = [{"role": "you", "content": "Hi."}, {"role": "me", "content": "Hello."}]

DATA_SETS = {
    "alpaca": (
        {},
        [
            {"instruction": "Add.", "input": "1 + 1", "output": "2"},
            {"instruction": "Greet.", "input": "", "output": "Hi."},
        ],
    ),
    "columns": (
        {"columns": {"prompt": "q", "response": "a", "system": "s", "history": "h"}},
        [{"q": "Why?", "a": "So.", "s": "Be brief.", "h": [["Who?", "Me."]], "input": "unused"}],
    ),
    "tools": (
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}},
        [
            {
                "conversations": [
                    {"from": "human", "value": "Rain?"},
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": "no"},
                    {"from": "gpt", "value": "No."},
                ],
                "tools": json.dumps(TOOLS),
            }
        ],
    ),
    "tags": (
        {
            "formatting": "sharegpt",
            "columns": {"messages": "turns", "system": "rules"},
            "tags": {**TAGS, "system_tag": "rules"},
        },
        [
            {"turns": TURNS, "rules": "Be kind."},
            {"turns": [{"role": "rules", "content": "Smile."}, *TURNS], "rules": "overridden"},
        ],
    ),
}
"""Name -> its description, without the file, and its records."""


@pytest.mark.parametrize("name", DATA_SETS)
def test_conversations(name, tmp_path):
    description, records = DATA_SETS[name]
    (tmp_path / "records.json").write_text(json.dumps(records))
    info = {name: {"file_name": "records.json", **description}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    [attributes] = get_dataset_list([name], str(tmp_path))
    convert = get_dataset_converter(attributes.formatting, attributes, DataArguments())
    expected = [conversation(convert(record)) for record in records]
    assert [ours(example) for example in load_examples(name, str(tmp_path))] == expected


def conversation(converted: dict) -> tuple[str, list, list]:
    """Returns system prompt, (role, content) pairs and tools of an example of LLaMA-Factory."""
    messages = [(turn["role"], turn["content"]) for turn in converted["_prompt"] + converted["_response"]]
    calls = [(role, json.loads(text) if role == "function" else text) for role, text in messages]
    return converted["_system"], calls, json.loads(converted["_tools"] or "[]")


def ours(example) -> tuple[str, list, list]:
    """Returns the same of an example of ktops."""
    names = {"user": "user", "assistant": "assistant", "tool": "observation"}
    system = [message["content"] for message in example.messages if message["role"] == "system"]
    turns: list[tuple[str, object]] = []
    for message in example.messages[len(system) :]:
        if "tool_calls" in message:
            turns += [("function", call["function"]) for call in message["tool_calls"]]
        else:
            turns.append((names[message["role"]], message["content"]))
    return "".join(system), turns, [tool["function"] for tool in example.variables.get("tools", [])]
