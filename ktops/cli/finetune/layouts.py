"""The layouts of training records, and the examples that they become.

A record with messages (``messages``, ``conversations``, alpaca, ``prompt`` and ``completion`` as lists)
becomes a :class:`Conversation`, and one with text (``text``, ``prompt`` and ``completion`` as strings) a
:class:`PlainText`. Keys that a layout does not know are kept. Applying the chat template shows whether it
writes them.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, field

from ktops.cli.errors import UserError
from ktops.cli.finetune.messages import is_absent, is_answer, message_text, normalize, parsed_json, without

LAYOUTS = {
    "messages": {"messages"},
    "conversations": {"conversations"},
    "alpaca": {"instruction", "output"},
    "prompt and completion": {"prompt", "completion"},
    "text": {"text"},
}
"""Name of a layout -> the keys that identify it."""

KNOWN = (
    "Known layouts: messages (a list of {role, content}), conversations (a list of {from, value}), alpaca "
    "(instruction, output, optionally input, system, history), prompt and completion, text"
)


@dataclass(frozen=True)
class Conversation:
    """An example that is written with the tokenizer's chat template.

    Attributes:
        messages: for ``apply_chat_template``; arguments of calls are dicts, absent content has no key.
        variables: the template's other inputs: tools, documents, and any other key of the record.
        first: index of the first message to train on.
        where: the file and the line, for error messages.
    """

    messages: list[dict]
    variables: dict[str, object] = field(default_factory=dict)
    first: int = 0
    where: str = "example"

    @property
    def question(self) -> str:
        """The text of the message before the last answer."""
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")
        return message_text(self.messages[last - 1]) if last else ""


@dataclass(frozen=True)
class PlainText:
    """An example without a chat template. Only the completion is trained on; the prompt may be empty."""

    prompt: str
    completion: str
    where: str = "example"

    @property
    def question(self) -> str:
        return self.prompt


Example = Conversation | PlainText


def read_record(record: object, where: str, ignored: Collection[str] = ()) -> Example:
    """Returns the example in a record of a data file.

    Args:
        record: a JSON value; it must be an object with the keys of one of LAYOUTS.
        where: the file and the line, for error messages.
        ignored: keys of records, messages and calls to leave out.

    Raises:
        UserError: the record has no layout or several, or a value has the wrong type.
    """
    if not isinstance(record, dict):
        raise UserError(f"--data: {where}: expected a JSON object, got {json.dumps(record)[:60]}")
    record = {key: value for key, value in without(record, ignored).items() if value is not None}
    if not record:
        raise UserError(f"--data: {where}: the record is empty")
    found = [name for name, keys in LAYOUTS.items() if keys <= record.keys()]
    if not found:
        raise UserError(f"--data: {where}: unknown layout with the keys {sorted(record)}. {KNOWN}")
    if len(found) > 1:
        superfluous = ",".join(sorted(set().union(*(LAYOUTS[name] for name in found[1:]))))
        raise UserError(
            f"--data: {where}: the record has {len(found)} layouts, {' and '.join(found)}. "
            f"To use the first, leave out the keys of the other: --ignore-keys {superfluous}"
        )
    if found == ["alpaca"]:
        return from_alpaca(record, where, ignored)
    if found == ["text"] or (found == ["prompt and completion"] and isinstance(record["prompt"], str)):
        return _from_text(record, where)
    if found == ["prompt and completion"]:
        prompt, completion = (_messages(record, key, where, ignored) for key in ("prompt", "completion"))
        return _conversation(prompt + completion, record, LAYOUTS[found[0]], where, first=len(prompt))
    (key,) = LAYOUTS[found[0]]
    return _conversation(_messages(record, key, where, ignored), record, {key}, where)


def from_alpaca(record: dict, where: str = "example", ignored: Collection[str] = ()) -> Conversation:
    """Returns an alpaca example as a conversation: instruction and input ask, output answers."""
    for key in ("instruction", "input"):
        if not isinstance(record.get(key) or "", str):
            raise UserError(f"--data: {where}: {key} must be a string, got {record[key]!r}")
    question = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
    history = record.get("history") or []
    if not isinstance(history, list):
        raise UserError(
            f"--data: {where}: history must be a list of [question, answer] pairs, got {history!r}"
        )
    messages = []
    for turn in [*history, (question, record["output"])]:
        if not (isinstance(turn, list | tuple) and len(turn) == 2):
            raise UserError(
                f"--data: {where}: history must be a list of [question, answer] pairs, got {turn!r}"
            )
        for role, content in zip(("user", "assistant"), turn, strict=True):
            messages.append(normalize({"role": role, "content": content}, where, ignored))
    return _conversation(messages, record, {"instruction", "input", "output", "history"}, where)


def _messages(record: dict, key: str, where: str, ignored: Collection[str]) -> list[dict]:
    messages = record[key]
    if not isinstance(messages, list):
        wanted = "a list, or both strings" if key in ("prompt", "completion") else "a list"
        raise UserError(f"--data: {where}: {key} must be {wanted}, got {type(messages).__name__}")
    return [normalize(message, where, ignored) for message in messages]


def _conversation(
    messages: list[dict], record: dict, known: Collection[str], where: str, first: int = 0
) -> Conversation:
    """Returns a Conversation. Keys of the record other than ``known`` and ``system`` go to the template."""
    system = record.get("system")
    if not is_absent(system):
        if not isinstance(system, str):
            raise UserError(f"--data: {where}: system must be a string, got {system!r}")
        if messages and messages[0]["role"] == "system":
            raise UserError(
                f"--data: {where}: the record has both a system message and the key system. "
                "To use the message: --ignore-keys system"
            )
        messages, first = [{"role": "system", "content": system}, *messages], first + bool(first)
    if not any(is_answer(message) for message in messages[first:]):
        raise UserError(
            f"--data: {where}: nothing to train on (no assistant message with text or tool calls)"
        )
    variables = _variables(without(record, {*known, "system"}), where)
    return Conversation(messages, variables, first, where)


def _variables(rest: dict, where: str) -> dict[str, object]:
    variables = {key: value for key, value in rest.items() if not is_absent(value)}
    more = variables.pop("chat_template_kwargs", {})
    if not isinstance(more, dict) or more.keys() & variables.keys():
        raise UserError(
            f"--data: {where}: chat_template_kwargs must be an object that repeats no key of the record, got "
            f"{more!r}"
        )
    variables |= {key: value for key, value in more.items() if value is not None}
    if "tools" in variables:
        tools = parsed_json(variables["tools"], "tools", where)
        if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise UserError(f"--data: {where}: tools must be a list of JSON schemas, got {tools!r}")
        variables["tools"] = [_tool(tool) for tool in tools]
        if not tools:
            del variables["tools"]
    return variables


def _tool(tool: dict) -> dict:
    """Wraps a bare function schema as transformers and OpenAI do."""
    return {"type": "function", "function": tool} if "name" in tool and "type" not in tool else tool


def _from_text(record: dict, where: str) -> PlainText:
    keys = ("text",) if "text" in record else ("prompt", "completion")
    for key in keys:
        if not isinstance(record[key], str):
            raise UserError(f"--data: {where}: {key} must be a string, got {record[key]!r}")
    if others := sorted(key for key, value in without(record, keys).items() if not is_absent(value)):
        raise UserError(
            f"--data: {where}: the layout {' and '.join(keys)} does not use the keys {others}. "
            f"To leave them out: --ignore-keys {','.join(others)}"
        )
    if not record[keys[-1]].strip():
        raise UserError(f"--data: {where}: nothing to train on ({keys[-1]} is empty)")
    return PlainText(record["prompt"] if len(keys) == 2 else "", record[keys[-1]], where)
