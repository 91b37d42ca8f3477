"""Writes conversations with a chat template, and checks that the template leaves nothing out.

A template's source does not reveal which keys it writes, so each key is tested: markers in place of text must
appear in the output, and removing any other key must change the output.
"""

import inspect
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

from ktops.cli.errors import UserError
from ktops.cli.finetune.layouts import Conversation
from ktops.cli.finetune.messages import without

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "{{ '### Response:\\n' + message.content + eos_token }}"
    "{%- else -%}"
    "{{ '' if loop.first else '\\n\\n' }}"
    "{{ '### ' + {'user': 'Instruction', 'system': 'System', 'tool': 'Input'}[message.role] + ':\\n' }}"
    "{{ message.content }}"
    "{%- if loop.last or loop.nextitem.role == 'assistant' -%}{{ '\\n\\n' }}{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
)
"""Used if a tokenizer has no chat template: the headings of the alpaca prompt, with eos after each answer."""


@dataclass(frozen=True)
class Answer:
    """An answer of a conversation, as a chat template writes it.

    Attributes:
        prompt: the model's input for producing the answer.
        text: the conversation up to the end of the answer.
        start: the index in text where the answer begins.
        after: the text that follows if the conversation continues.
    """

    prompt: str
    text: str
    start: int
    after: str = ""


class _TemplateError(UserError):
    """Describes what is wrong with a form of a conversation, and how many messages preceded the error."""

    def __init__(self, message: str, progress: float):
        super().__init__(message)
        self.progress = progress


def answers(conversation: Conversation, tokenizer) -> list[Answer]:
    """Returns the answers to train on, each with the text before it.

    Templates differ in how they accept calls and missing text. Equivalent forms of the conversation are tried
    in turn; the first that the template writes completely is used.

    Raises:
        UserError: the template rejects the conversation, or leaves out a key or a text; the message names the
            record and the keys.
    """
    failures = []
    for messages in _forms(conversation.messages):
        try:
            return _Writer(conversation, tokenizer).answers(messages)
        except _TemplateError as error:
            failures.append(error)
    raise max(failures, key=lambda error: error.progress)


def _forms(messages: list[dict]) -> Iterator[list[dict]]:
    """Yields the conversation unchanged, and in forms that some templates need: arguments as JSON text, None
    or "" as the content of a message without text, a single text part as a string."""
    choices: list[tuple[Callable[[dict], dict], ...]] = []
    if any("content" not in message for message in messages):
        choices.append((dict, partial(_with_content, content=None), partial(_with_content, content="")))
    if any("tool_calls" in message for message in messages):
        choices.append((dict, _with_json_arguments))
    if any(isinstance(message.get("content"), list) for message in messages):
        choices.append((dict, _with_single_part_as_string))
    for changes in itertools.product(*choices):
        form = messages
        for change in changes:
            form = [change(message) for message in form]
        yield form


def _with_content(message: dict, content: str | None) -> dict:
    return {"content": content, **message}


def _with_json_arguments(message: dict) -> dict:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
        for call in message["tool_calls"]
        for function in [call["function"]]
    ]
    return {**message, "tool_calls": calls}


def _with_single_part_as_string(message: dict) -> dict:
    content = message.get("content")
    if isinstance(content, list) and len(content) == 1:
        return {**message, "content": content[0]["text"]}
    return message


class _Writer:
    """A chat template, and its inputs for one conversation in addition to the messages."""

    def __init__(self, conversation: Conversation, tokenizer):
        self.conversation, self.tokenizer = conversation, tokenizer
        taken = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"tools", "documents"}
        taken |= tokenizer.special_tokens_map.keys() | {"messages"}
        self.variables = without(conversation.variables, taken)
        self.dropped = [(key, key) for key in conversation.variables if key in taken]

    def answers(self, messages: list[dict]) -> list[Answer]:
        asked = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        found = [self.answer(messages[: i + 1], self.variables) for i in asked]
        for previous, i, answer in zip([-1, *asked], asked, found, strict=False):
            self.check(messages[: i + 1], previous + 1, answer.text)
        for key in self.variables:
            if self.is_unused(key, messages, asked, found):
                self.dropped.append((key, key))
        if self.dropped:
            raise _TemplateError(self.complaint(), math.inf)
        return [
            replace(answer, after=self.after(messages, i))
            for i, answer in zip(asked, found, strict=True)
            if i >= self.conversation.first
        ]

    def after(self, messages: list[dict], i: int) -> str:
        """Returns what the template writes after message i for the next message, or for an expected one if i
        is the last; "" if it rejects that, or then writes message i differently, even without its text."""
        answer = {**messages[i], "content": "-"}
        answer = {key: answer[key] for key in ("role", "content", "tool_calls") if key in answer}
        expected = {"role": "tool" if "tool_calls" in answer else "user", "content": "-"}
        following = messages[i + 1 : i + 2] or [expected]
        try:
            text = self.write([*messages[:i], answer])
            longer = self.write([*messages[:i], answer, *following])
        except _TemplateError:
            return ""
        return longer.removeprefix(text) if longer.startswith(text) else ""

    def write(self, messages: list[dict], variables: dict | None = None, **kwargs) -> str:
        variables = self.variables if variables is None else variables
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **variables, **kwargs)
        except Exception as error:  # a template may raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise _TemplateError(
                f"--data: {self.conversation.where}: the chat template rejects a conversation with the roles "
                f"{roles}: {error}",
                len(messages),
            ) from None

    def answer(self, messages: list[dict], variables: dict) -> Answer:
        """Returns the last message as the answer to the others."""
        if len(messages) == 1:
            text = self.write(messages, variables)
            return Answer("", text, self.first_difference(messages, text))
        prompt = self.write(messages[:-1], variables, add_generation_prompt=True)
        text = self.write(messages, variables)
        if text.startswith(prompt):
            return Answer(prompt, text, len(prompt))
        bare = self.write(messages[:-1], variables)
        if text.startswith(bare):
            return Answer(prompt, text, len(bare))
        return Answer(prompt, text, self.start(messages, text, prompt.removeprefix(bare)))

    def start(self, messages: list[dict], text: str, heading: str) -> int:
        """Returns where the last message begins if its presence changes what the template writes before it:
        after the heading of an answer that follows the others, otherwise where its own text begins."""
        changed = [*messages[:-2], _marked(messages[-2]), messages[-1]]
        end = len(text) - _length_in_common(text[::-1], self.write(changed)[::-1])
        if end == 0:
            raise _TemplateError(
                f"--data: {self.conversation.where}: the chat template rewrites the text before message "
                f"{len(messages)}, so ktops cannot tell where this answer begins",
                len(messages),
            )
        latest = self.first_difference(messages, text)
        found = text.find(heading, end, latest) if heading else -1
        return latest if found < 0 else found + len(heading)

    def first_difference(self, messages: list[dict], text: str) -> int:
        return _length_in_common(text, self.write([*messages[:-1], _marked(messages[-1])]))

    def check(self, messages: list[dict], first: int, text: str) -> None:
        """Records what the text leaves out of the messages from ``first`` on."""
        numbers = itertools.count()
        marked = [*messages[:first], *(_marked(message, numbers, TEXT_KEYS) for message in messages[first:])]
        written = self.write(marked)
        for i in range(first, len(messages)):
            name = f"of message {i + 1} ({messages[i]['role']})"
            for key in TEXT_KEYS:
                if key in marked[i] and not _is_written(marked[i][key], written):
                    has_parts = key == "content" and isinstance(marked[i][key], list)
                    what = "content, a list of parts," if has_parts else key
                    self.dropped.append((f"{what} {name}", key))
            for key in without(messages[i], {"role", *TEXT_KEYS}):
                rest = [*messages[:i], without(messages[i], {key}), *messages[i + 1 :]]
                if not _repeats_call(messages, i, key) and self.is_same(rest, text):
                    self.dropped.append((f"{key} {name}", key))

    def is_same(self, messages: list[dict], text: str) -> bool:
        try:
            return self.write(messages) == text
        except _TemplateError:
            return False

    def is_unused(self, key: str, messages: list[dict], asked: list[int], found: list[Answer]) -> bool:
        rest = without(self.variables, {key})
        try:
            return [self.answer(messages[: i + 1], rest) for i in asked] == found
        except _TemplateError:
            return False

    def complaint(self) -> str:
        names = ", ".join(name for name, _ in self.dropped)
        if self.tokenizer.chat_template == CHAT_TEMPLATE:
            template = "the model has no chat template, and the alpaca headings used instead leave out"
        else:
            template = "the chat template of the model leaves out"
        keys = ",".join(sorted({key for _, key in self.dropped} - {"content"}))
        them = "it" if len(self.dropped) == 1 else "them"
        ignore = f", or train without {them}: --ignore-keys {keys}" if keys else ""
        return (
            f"--data: {self.conversation.where}: {template} {names}. "
            f"Give the model a template that writes {them} (chat_template.jinja in its directory){ignore}"
        )


TEXT_KEYS = ("content", "tool_calls")
"""Keys of a message whose text must be written completely."""

THINK_TAGS = re.compile(r"(</?think>)")
"""Matches the tags with which templates separate reasoning from content."""


def _marked(message: dict, numbers: Iterator[int] | None = None, keys: Collection[str] = ()) -> dict:
    """Returns the message with a marker in place of every text, under these keys, by default all but role."""
    numbers = itertools.count() if numbers is None else numbers

    def mark(text: str) -> str:
        """Returns a marker whose first letter differs from the text's."""
        return (
            f"{'Y' if text.lstrip().startswith('Z') else 'Z'}mark{next(numbers)}Z" if text.strip() else text
        )

    def mark_content(text: str) -> str:
        return "".join(part if THINK_TAGS.fullmatch(part) else mark(part) for part in THINK_TAGS.split(text))

    def mark_call(call: dict) -> dict:
        arguments = call["function"]["arguments"]
        values = json.loads(arguments) if isinstance(arguments, str) else arguments
        values = {key: mark(str(value) or "-") for key, value in values.items()}
        arguments = json.dumps(values) if isinstance(arguments, str) else values
        return {**call, "function": {"name": mark(call["function"]["name"]), "arguments": arguments}}

    def mark_value(key: str, value: object) -> object:
        if key == "tool_calls" and isinstance(value, list):
            return [mark_call(call) for call in value]
        if isinstance(value, str):
            return mark_content(value)
        if key == "content" and isinstance(value, list):
            return [{**part, "text": mark_content(part["text"])} for part in value]
        return value

    return {
        key: mark_value(key, value) if key != "role" and (not keys or key in keys) else value
        for key, value in message.items()
    }


def _is_written(marked: object, text: str) -> bool:
    """True if the text contains every marker of a value, and no object as a Python literal."""
    if not all(marker in text for marker in re.findall(r"[YZ]mark\d+Z", str(marked))):
        return False
    items = marked if isinstance(marked, list) else []
    objects = [item["function"]["arguments"] if "function" in item else item for item in items]
    return not any(str(item) in text for item in objects if isinstance(item, dict) and item)


def _repeats_call(messages: list[dict], i: int, key: str) -> bool:
    """True if the key of a tool result only repeats what its position implies: the n-th result answers the
    n-th call."""
    if messages[i]["role"] != "tool" or key not in ("tool_call_id", "name"):
        return False
    call = i - 1
    while call > 0 and messages[call]["role"] == "tool":
        call -= 1
    calls = messages[call].get("tool_calls", []) if call >= 0 else []
    if len(calls) < i - call:
        return False
    called = calls[i - call - 1]
    return messages[i][key] == (called.get("id") if key == "tool_call_id" else called["function"]["name"])


def _length_in_common(a: str, b: str) -> int:
    different = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))
