"""Reads the keys of a YAML file, with the lines they are on."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ktops.cli.errors import UserError


class Entry(NamedTuple):
    """The value of a key, and the line that the key is on, from 1."""

    value: Any
    line: int


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 and OmegaConf do; PyYAML reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Entry]:
    """Returns the keys of a YAML file that holds one mapping, in their order.

    Raises:
        UserError: the file cannot be read, is not YAML or not a mapping, or has a key twice; the message
            names the file and the line.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8-sig"))
        root = loader.get_single_node()
        repeated = next(_repeated_keys(root), None)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{_where(path, error)}: not valid YAML ({_problem(error)})") from None
    if root is None:
        raise UserError(f"{path} is empty")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: expected keys and values, such as `lora_rank: 8`, got a {root.id}")
    if repeated is not None:
        raise UserError(f"{path}, line {repeated.line}: the key {repeated.value} is given twice")
    entries = {}
    for key, value in root.value:
        try:
            entries[str(key.value)] = Entry(loader.construct_object(value, deep=True), _line(key))
        except (yaml.YAMLError, ValueError) as error:
            problem = _problem(error)
            raise UserError(
                f"{path}, line {_line(value)}: {key.value} has no valid value ({problem})"
            ) from None
    return entries


def _repeated_keys(node: yaml.Node | None) -> Iterator[Entry]:
    """Yields every key that its mapping already has. PyYAML would keep the last one."""
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                yield Entry(str(key.value), _line(key))
            seen.add(str(key.value))
        children = [value for _, value in node.value]
    for child in children:
        yield from _repeated_keys(child)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _where(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{path}, line {mark.line + 1}" if mark else str(path)


def _problem(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]
