"""Converts messages of training records to the form that transformers' chat templates expect.

That is ``{"role", "content"}`` and any other key of the message. ``from`` and ``value`` (ShareGPT) become
role and content; ``tool_calls`` become ``[{"type": "function", "function": {"name", "arguments": dict}}]``.
"""

import json
from collections.abc import Collection

from ktops.cli.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}

CALL_KEYS = {"id", "type", "index", "function", "name", "arguments"}


def is_absent(value: object) -> bool:
    """True for null, "", [] and {}, which mean that a key has no value."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def without(mapping: dict, keys: Collection[str]) -> dict:
    return {key: value for key, value in mapping.items() if key not in keys}


def is_answer(message: dict) -> bool:
    return message["role"] == "assistant" and any(
        not is_absent(message[key]) for key in message.keys() - {"role"}
    )


def message_text(message: dict) -> str:
    """Returns the content of a message as one string."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def parsed_json(value: object, key: str, where: str) -> object:
    """Returns the value, parsed as JSON if it is a string.

    Raises:
        UserError: the string is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(f"--data: {where}: {key} is not valid JSON ({error.msg}): {value[:60]!r}") from None


def normalize(message: object, where: str, ignored: Collection[str] = ()) -> dict:
    """Returns a message as chat templates expect it, without keys that have no value, except ``content: ""``.

    Raises:
        UserError: it has no role, an unknown role, no content where required, or a call without a name.
    """
    if not isinstance(message, dict):
        raise UserError(
            f"--data: {where}: every message needs the keys role and content, got {type(message).__name__}"
        )
    keys = sorted(message)
    message = without(message, ignored)
    for sharegpt, name in (("from", "role"), ("value", "content")):
        if sharegpt in message and name not in message:
            message = {name: message[sharegpt], **without(message, {sharegpt})}
    message = {
        key: value
        for key, value in message.items()
        if not is_absent(value) or (key == "content" and value is not None)
    }
    if "role" not in message:
        raise UserError(f"--data: {where}: every message needs the keys role and content, got {keys}")
    if message["role"] == "function_call":
        message = _with_calls(message, where)
    role = message["role"]
    message["role"] = role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        names = ", ".join((*ROLES, *SHAREGPT_ROLES))
        raise UserError(f"--data: {where}: role must be one of {names}, got {role!r}")
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], where, ignored)
    if "content" in message:
        message["content"] = _content(message["content"], where, ignored)
    elif not is_answer(message):
        raise UserError(f"--data: {where}: every message needs the keys role and content, got {keys}")
    return message


def _with_calls(message: dict, where: str) -> dict:
    """Converts ShareGPT's function_call, whose content is JSON for one or more calls, after any reasoning."""
    reasoning, call = "", message.get("content")
    if isinstance(call, str) and "</think>" in call:
        reasoning, tag, call = call.partition("</think>")
        reasoning += tag
    calls = parsed_json(call, "the value of function_call", where)
    message = {**message, "content": reasoning, "tool_calls": calls if isinstance(calls, list) else [calls]}
    return message if reasoning else without(message, {"content"})


def _calls(calls: object, where: str, ignored: Collection[str]) -> list[dict]:
    if not isinstance(calls, list):
        raise UserError(f"--data: {where}: tool_calls must be a list of calls, got {calls!r}")
    return [_call(call, where, ignored) for call in calls]


def _call(call: object, where: str, ignored: Collection[str]) -> dict:
    """Returns ``{"type": "function", "function": {"name", "arguments"}}``, with any id and index."""
    if isinstance(call, dict):
        call = {key: value for key, value in without(call, ignored).items() if value is not None}
        function = call.get("function", {key: call[key] for key in ("name", "arguments") if key in call})
    if (
        not isinstance(call, dict)
        or not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
    ):
        raise UserError(f"--data: {where}: a call must be {{function: {{name, arguments}}}}, got {call!r}")
    function = {key: value for key, value in without(function, ignored).items() if value is not None}
    allowed = CALL_KEYS - ({"name", "arguments"} if "function" in call else {"function"})
    others = sorted((call.keys() - allowed) | (function.keys() - {"name", "arguments"}))
    if others:
        raise UserError(
            f"--data: {where}: a call of tool_calls has the unknown keys {others}. "
            f"To leave them out: --ignore-keys {','.join(others)}"
        )
    arguments = parsed_json(function.get("arguments", {}), f"arguments of {function['name']}", where)
    if not isinstance(arguments, dict):
        raise UserError(
            f"--data: {where}: arguments of {function['name']} must be a JSON object, got {arguments!r}"
        )
    more = {key: call[key] for key in ("id", "index") if key in call}
    return {
        **more,
        "type": call.get("type", "function"),
        "function": {"name": function["name"], "arguments": arguments},
    }


def _content(content: object, where: str, ignored: Collection[str]) -> str | list[dict]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(
            f"--data: {where}: the content of a message must be a string or a list of text parts, "
            f"got {content!r}"
        )
    parts = [without(part, ignored) if isinstance(part, dict) else part for part in content]
    for part in parts:
        if not (isinstance(part, dict) and part.keys() == {"type", "text"} and isinstance(part["text"], str)):
            raise UserError(
                f"--data: {where}: a part of a message's content must be {{type: text, text: a string}}, "
                f"got {part!r}"
            )
    return parts
