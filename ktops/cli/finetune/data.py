"""Reads files of training records, JSON or JSONL."""

import json
from pathlib import Path
from typing import Any

from ktops.cli.errors import UserError

SUFFIXES = (".json", ".jsonl")


def read_records(path: Path) -> list[tuple[str, object]]:
    """Returns (location, JSON value) of every record of a data file, in file order.

    Args:
        path: a JSON array, or one JSON object per line (JSONL), determined by the first character.

    Raises:
        UserError: the file is missing or empty, or not JSON; the message names the line.
    """
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
        values = parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--data: {path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except RepeatedKeyError as error:
        raise UserError(f"--data: {path}: {error}") from None
    return [(f"{path}, example {i}", value) for i, value in enumerate(values, start=1)]


def _value(line: str, where: str) -> object:
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"--data: {where}: not valid JSON ({error.msg}). "
            "A data file is a JSON array, or one JSON object per line"
        ) from None
    except RepeatedKeyError as error:
        raise UserError(f"--data: {where}: {error}") from None


class RepeatedKeyError(Exception):
    """An object in JSON text has a key twice; json would silently keep the last one."""


def parse_json(text: str) -> Any:
    """Returns the value of JSON text.

    Raises:
        json.JSONDecodeError, RepeatedKeyError
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"an object has the key {repeated!r} twice, with the keys {sorted(result)}")
    return result
