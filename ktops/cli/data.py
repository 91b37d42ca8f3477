"""Reads the user's training file: JSON or JSONL, in the layouts of :mod:`ktops.cli.layouts`."""

import json
from collections.abc import Collection
from pathlib import Path

from ktops.cli.errors import UserError
from ktops.cli.layouts import Example, read_record


def load_examples(path: Path, ignored: Collection[str] = ()) -> list[Example]:
    """Returns every example of a data file, in file order.

    Args:
        path: a JSON array, or one JSON object per line (JSONL), determined by the first character. The keys
            of each object determine its layout.
        ignored: keys of records, messages and calls to leave out.

    Raises:
        UserError: the file is missing or empty, a line is not JSON, or an example has an unknown layout; the
            message names the line (or the position in the array) and the keys found.
    """
    return [read_record(record, where, ignored) for where, record in _records(path)]


def _records(path: Path) -> list[tuple[str, object]]:
    """Returns (location, JSON value) of every example."""
    if not path.is_file():
        raise UserError(f"--data: no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data: {path} is not a JSON or JSONL file in UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    if text.lstrip().startswith("["):
        records = _array(text, path)
    else:
        records = [
            (f"{path}, line {number}", _value(line, f"{path}, line {number}"))
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    if not records:
        raise UserError(f"--data: {path} is empty")
    return records


def _array(text: str, path: Path) -> list[tuple[str, object]]:
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise UserError(f"--data: {path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except _RepeatedKeyError as error:
        raise UserError(f"--data: {path}: {error}") from None
    return [(f"{path}, example {i}", value) for i, value in enumerate(values, start=1)]


def _value(line: str, where: str) -> object:
    try:
        return json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise UserError(
            f"--data: {where}: not valid JSON ({error.msg}). "
            "A data file is a JSON array, or one JSON object per line"
        ) from None
    except _RepeatedKeyError as error:
        raise UserError(f"--data: {where}: {error}") from None


class _RepeatedKeyError(Exception):
    pass


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Returns a JSON object; rejects repeated keys, because json would silently keep the last one."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _RepeatedKeyError(f"an object has the key {repeated!r} twice, with the keys {sorted(result)}")
    return result
