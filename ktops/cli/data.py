"""Reads the user's training file: JSON or JSONL, in the ``alpaca`` or the ``messages`` layout.

Whatever the layout, an example becomes a conversation: ``[{"role": "user", "content": ...}, {"role":
"assistant", "content": ...}]``, optionally with a system message first and with further turns.
"""

import json
from pathlib import Path

from ktops.cli.errors import UserError

ROLES = ("system", "user", "assistant", "tool")

Conversation = list[dict[str, str]]


def load_conversations(path: Path) -> list[Conversation]:
    """Every example of a data file, in the order of the file.

    Args:
        path: a JSON array, or one JSON object a line (JSONL); which of the two is seen from the first
            character. Objects with ``instruction`` and ``output`` (and ``input``, ``system``, ``history`` if
            wanted) are read as alpaca, objects with ``messages`` as conversations.

    Raises:
        UserError: the file is missing or empty, a line is not JSON, or an example has another layout; the
            message names the line (or the position in the array) and the keys found.
    """
    return [_conversation(record, where) for where, record in _records(path)]


def _records(path: Path) -> list[tuple[str, object]]:
    """(where it stands, the JSON value) of every example"""
    if not path.is_file():
        raise UserError(f"--data: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data: {path} is not a JSON or JSONL file in UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    if not text.strip():
        raise UserError(f"--data: {path} is empty")
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"--data: {path}, line {error.lineno}: not valid JSON ({error.msg})") from None
        return [(f"{path}, example {i}", record) for i, record in enumerate(records, start=1)]
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append((f"{path}, line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"--data: {path}, line {number}: not valid JSON ({error.msg}). "
                    "A data file is a JSON array, or one JSON object a line"
                ) from None
    return records


def _conversation(record: object, where: str) -> Conversation:
    if not isinstance(record, dict):
        raise UserError(f"--data: {where}: expected a JSON object, got {json.dumps(record)[:60]}")
    if "messages" in record:
        return _from_messages(record["messages"], where)
    if "instruction" in record and "output" in record:
        return from_alpaca(record, where)
    raise UserError(
        f"--data: {where}: unknown layout with the keys {sorted(record)}. Known layouts: alpaca "
        "(instruction, output, optionally input, system, history) and messages (a list of {role, content})"
    )


def from_alpaca(record: dict, where: str = "example") -> Conversation:
    """The conversation of an alpaca example: instruction and input are the user's turn, output is the
    answer."""
    for key in ("instruction", "input", "system"):
        if not isinstance(record.get(key) or "", str):
            raise UserError(f"--data: {where}: {key} must be a string, got {record[key]!r}")
    question = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
    turns = [*(record.get("history") or []), (question, record["output"])]
    conversation = []
    if record.get("system"):
        conversation.append({"role": "system", "content": record["system"]})
    for turn in turns:
        if not (isinstance(turn, list | tuple) and len(turn) == 2):
            raise UserError(
                f"--data: {where}: history must be a list of [question, answer] pairs, got {turn!r}"
            )
        conversation.append({"role": "user", "content": turn[0]})
        conversation.append({"role": "assistant", "content": turn[1]})
    return _checked(conversation, where)


def _from_messages(messages: object, where: str) -> Conversation:
    if not isinstance(messages, list):
        raise UserError(f"--data: {where}: messages must be a list, got {type(messages).__name__}")
    for message in messages:
        if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
            keys = sorted(message) if isinstance(message, dict) else type(message).__name__
            raise UserError(f"--data: {where}: every message needs the keys role and content, got {keys}")
    return _checked([{"role": m["role"], "content": m["content"]} for m in messages], where)


def _checked(conversation: Conversation, where: str) -> Conversation:
    for message in conversation:
        if message["role"] not in ROLES:
            raise UserError(
                f"--data: {where}: role must be one of {', '.join(ROLES)}, got {message['role']!r}"
            )
        if not isinstance(message["content"], str):
            raise UserError(
                f"--data: {where}: the content of a message must be a string, got {message['content']!r}"
            )
    if not any(message["role"] == "assistant" and message["content"] for message in conversation):
        raise UserError(f"--data: {where}: there is no answer to learn (no assistant message with text)")
    return conversation
