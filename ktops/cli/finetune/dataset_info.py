"""The descriptions of data sets in LLaMA-Factory's dataset_info.json, and the records they describe."""

import difflib
from dataclasses import dataclass
from typing import Any

from ktops.cli.errors import UserError

INFO = "dataset_info.json"

_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": None,
    "messages": "conversations",
    "system": None,
    "tools": None,
}
"""Column -> its name in the records if the description has no ``columns``; with them, others have no name."""

_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}

_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
"""Tag -> the role that it means."""

_FORMATS = ("alpaca", "sharegpt", "openai")

_REFUSED = {
    "hf_hub_url": "download it, and give its file as file_name",
    "ms_hub_url": "download it, and give its file as file_name",
    "om_hub_url": "download it, and give its file as file_name",
    "script_url": "run the script, and give the file with its result as file_name",
    "cloud_file_name": "download it, and give its file as file_name",
    "subset": "it belongs to data sets on a hub",
    "folder": "it belongs to data sets on a hub",
}
"""Key of a description that ktops finetune does not support -> what to do."""

_OTHER_STAGES = "ktops finetune trains in stage sft; for others: ktops launch llamafactory-cli train"
_MEDIA = "ktops finetune trains on text; for images, videos and audio: ktops launch llamafactory-cli train"

_REFUSED_COLUMNS = {
    "images": _MEDIA, "videos": _MEDIA, "audios": _MEDIA,
    "chosen": _OTHER_STAGES, "rejected": _OTHER_STAGES, "kto_tag": _OTHER_STAGES,
}  # fmt: skip

_KEYS = {"file_name", "formatting", "ranking", "split", "num_samples", "columns", "tags", *_REFUSED}


@dataclass(frozen=True)
class Description:
    """One entry of dataset_info.json.

    Attributes:
        where: the file and the name of the data set, for error messages.
        columns: column -> its name in the records, or None.
        tags: tag -> its value in the messages, or None.
        named: whether the entry itself names the columns, so that the records must have them.
    """

    where: str
    file_name: str
    formatting: str
    num_samples: int | None
    columns: dict[str, str | None]
    tags: dict[str, str | None]
    named: bool

    def convert(self, records: list[tuple[str, object]]) -> list[tuple[str, object]]:
        """Returns (location, record) pairs in a layout of :mod:`ktops.cli.finetune.layouts`.

        As in LLaMA-Factory, keys of the records that the description does not name are not used.

        Raises:
            UserError: a record is not an object or lacks what is needed.
        """
        for where, record in records:
            if not isinstance(record, dict):
                raise UserError(f"--data: {where}: expected a JSON object, got {str(record)[:60]}")
        present = {key for _, record in records if isinstance(record, dict) for key in record}
        needed = ("prompt", "response") if self.formatting == "alpaca" else ("messages",)
        for column, name in self.columns.items():
            if name is not None and name not in present and (self.named or column in needed):
                raise UserError(f"--data: {self.where}: no record has the column {name!r} ({column})")
        convert = self._from_alpaca if self.formatting == "alpaca" else self._from_messages
        return [(where, convert(record, where)) for where, record in records if isinstance(record, dict)]

    def _value(self, record: dict, column: str) -> Any:
        name = self.columns[column]
        return None if name is None else record.get(name)

    def _from_alpaca(self, record: dict, where: str) -> dict:
        questions = [self._value(record, column) for column in ("prompt", "query")]
        for question in questions:
            if not isinstance(question or "", str):
                raise UserError(f"--data: {where}: the prompt and the query must be text, got {question!r}")
        return {
            "instruction": "\n".join(filter(None, questions)),
            "output": self._value(record, "response"),
            **{column: self._value(record, column) for column in ("history", "system", "tools")},
        }

    def _from_messages(self, record: dict, where: str) -> dict:
        messages = self._value(record, "messages")
        if not isinstance(messages, list):
            raise UserError(f"--data: {where}: {self.columns['messages']} must be a list, got {messages!r}")
        messages = [self._message(message, where) for message in messages]
        begins_with_system = bool(messages) and messages[0]["role"] == "system"
        system = None if begins_with_system else self._value(record, "system")
        return {"messages": messages, "system": system, "tools": self._value(record, "tools")}

    def _message(self, message: object, where: str) -> dict:
        role_key, content_key = self.tags["role_tag"], self.tags["content_tag"]
        if not isinstance(message, dict) or role_key not in message:
            raise UserError(
                f"--data: {where}: every message needs the keys {role_key} and {content_key}, got {message!r}"
            )
        roles = {value: _ROLES[tag] for tag, value in self.tags.items() if tag in _ROLES and value}
        role = message[role_key]
        if role not in roles:
            raise UserError(
                f"--data: {where}: {role_key} must be one of {', '.join(roles)}, got {role!r}. "
                f"The tags in {self.where} name the roles"
            )
        converted = {"role": roles[role], "content": message.get(content_key)}
        if self.formatting == "openai" and message.get("tool_calls"):
            converted["tool_calls"] = message["tool_calls"]
        return converted


def describe(entry: object, where: str) -> Description:
    """Reads an entry of dataset_info.json.

    Raises:
        UserError: a key is unknown or has a wrong value, or asks for what ktops finetune does not support.
    """
    if not isinstance(entry, dict):
        raise UserError(f"--data: {where}: expected an object with file_name, got {entry!r}")
    _require_known(entry, _KEYS, where)
    for key, hint in _REFUSED.items():
        if entry.get(key):
            raise UserError(f"--data: {where}: {key} is not supported: {hint}")
    if entry.get("ranking"):
        raise UserError(f"--data: {where}: ranking is not supported: {_OTHER_STAGES}")
    if entry.get("split", "train") != "train":
        raise UserError(f"--data: {where}: split must be train, got {entry['split']!r}")
    file_name, formatting = entry.get("file_name"), entry.get("formatting", "alpaca")
    if not isinstance(file_name, str) or not file_name:
        raise UserError(f"--data: {where}: file_name must name a file, got {file_name!r}")
    if formatting not in _FORMATS:
        raise UserError(
            f"--data: {where}: formatting must be one of {', '.join(_FORMATS)}, got {formatting!r}"
        )
    number = entry.get("num_samples")
    if number is not None and (not isinstance(number, int) or number < 1):
        raise UserError(f"--data: {where}: num_samples must be a positive number, got {number!r}")
    columns = _names(entry, "columns", _COLUMNS, where)
    tags = _names(entry, "tags", _TAGS, where)
    for key in ("role_tag", "content_tag"):
        if formatting != "alpaca" and tags[key] is None:
            raise UserError(f"--data: {where}: tags: {key} is missing")
    needed = "response" if formatting == "alpaca" else "messages"
    if columns[needed] is None:
        raise UserError(f"--data: {where}: columns: {needed} is missing. {_OTHER_STAGES}")
    return Description(where, file_name, formatting, number, columns, tags, "columns" in entry)


def _names(entry: dict, key: str, defaults: dict[str, Any], where: str) -> dict[str, str | None]:
    """Returns the columns or tags of an entry, or the defaults if it has none."""
    given = entry.get(key)
    if given is None:
        return dict(defaults)
    if not isinstance(given, dict) or not all(isinstance(name, str | None) for name in given.values()):
        raise UserError(f"--data: {where}: {key} must be an object of names, got {given!r}")
    for column, hint in _REFUSED_COLUMNS.items():
        if key == "columns" and given.get(column):
            raise UserError(f"--data: {where}: the column {column} is not supported: {hint}")
    _require_known(given, {*defaults, *(_REFUSED_COLUMNS if key == "columns" else ())}, f"{where}: {key}")
    return {name: given.get(name) for name in defaults}


def _require_known(given: dict, known: set[str], where: str) -> None:
    for key in given.keys() - known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(sorted(known))}"
        raise UserError(f"--data: {where}: unknown key {key}; {hint}")
