"""Finds the data of a run: files, and data sets that a dataset_info.json of LLaMA-Factory describes."""

import difflib
import os
import random
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ktops.cli.errors import UserError
from ktops.cli.finetune.data import SUFFIXES, RepeatedKeyError, parse_json, read_records
from ktops.cli.finetune.dataset_info import INFO, Description, describe
from ktops.cli.finetune.layouts import Example, read_record


@dataclass(frozen=True)
class Source:
    """Files with records of one form. Without a description, the keys of each record tell its layout."""

    files: tuple[Path, ...]
    description: Description | None = None


def load_examples(
    data: str,
    dataset_dir: str | None = None,
    ignored: Collection[str] = (),
    max_samples: int | None = None,
    seed: int = 0,
) -> list[Example]:
    """Returns the examples of all data sets, one after the other.

    Args:
        data: a file, or several names separated by commas, each of a file or in dataset_info.json.
        dataset_dir: the directory of dataset_info.json; None if there is none.
        ignored: keys of records, messages and calls to leave out.
        max_samples: how many examples of each data set to use, the first ones.
        seed: chooses the records of data sets with ``num_samples``.

    Raises:
        UserError: a file is missing, or a record or its description is not as it should be.
    """
    examples: list[Example] = []
    for source in find_sources(data, dataset_dir):
        records = [record for file in source.files for record in read_records(file)]
        description = source.description
        if description is not None:
            records = description.convert(records)
            if description.num_samples is not None:
                records = _sampled(records, description.num_samples, seed)
        examples += [read_record(record, where, ignored) for where, record in records[:max_samples]]
    return examples


def find_sources(data: str, dataset_dir: str | None = None) -> list[Source]:
    """Returns where the data sets in ``data`` are; see :func:`load_examples`.

    Raises:
        UserError: a name is neither a file nor in dataset_info.json, or its description is wrong.
    """
    info = None if dataset_dir is None else _read_info(Path(dataset_dir))
    if os.path.isfile(data) and data not in (info or {}):
        return [Source((Path(data),))]
    names = [name for name in (part.strip() for part in data.split(",")) if name]
    return [_source(name, info, dataset_dir) for name in names]


def with_absolute_paths(data: str, dataset_dir: str | None, folders: list[Path]) -> str:
    """Returns ``data`` with absolute paths for the files in it, which are looked for in folders in turn."""

    def absolute(name: str) -> str:
        found = (folder / name for folder in folders if os.path.isfile(folder / name))
        return str(next((path.resolve() for path in found), name))

    info = {} if dataset_dir is None else _read_info(Path(dataset_dir))
    whole = absolute(data)
    names = [data] if os.path.isfile(whole) else [part.strip() for part in data.split(",")]
    return ",".join(name if name in info else absolute(name) for name in names if name)


def _source(name: str, info: dict | None, dataset_dir: str | None) -> Source:
    if info is not None and name in info:
        assert dataset_dir is not None
        description = describe(info[name], f"{Path(dataset_dir) / INFO}: {name}")
        return Source(_files(Path(dataset_dir) / description.file_name), description)
    if os.path.isfile(name):
        return Source((Path(name),))
    if info is None:
        raise UserError(f"--data: no such file: {name}; and no {INFO}, which could describe a data set")
    close = difflib.get_close_matches(name, info, n=1)
    hint = f". Did you mean {close[0]}?" if close else ""
    assert dataset_dir is not None
    raise UserError(f"--data: no such file: {name}, and no such name in {Path(dataset_dir) / INFO}{hint}")


def _files(path: Path) -> tuple[Path, ...]:
    files = tuple(sorted(path.iterdir())) if path.is_dir() else (path,)
    if not files:
        raise UserError(f"--data: {path} is empty")
    for file in files:
        if file.suffix not in SUFFIXES:
            raise UserError(
                f"--data: {file}: ktops finetune reads {' and '.join(SUFFIXES)} files. Convert it, for "
                "example with datasets.load_dataset(...).to_json(...)"
            )
    return files


def _read_info(directory: Path) -> dict:
    path = directory / INFO
    if not path.is_file():
        raise UserError(f"--dataset-dir: no {INFO} in {directory}")
    try:
        info = parse_json(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RepeatedKeyError) as error:
        raise UserError(f"--dataset-dir: {path} is not valid JSON: {error}") from None
    if not isinstance(info, dict):
        raise UserError(f"--dataset-dir: {path} must hold an object, got {type(info).__name__}")
    return info


def _sampled(records: list, number: int, seed: int) -> list:
    """Returns as many records, in random order: every one before any a second time."""
    rng = random.Random(f"{seed} num_samples")
    chosen = rng.sample(records, min(number, len(records)))
    return chosen + rng.choices(records, k=number - len(chosen))
