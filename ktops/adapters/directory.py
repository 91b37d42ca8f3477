"""Writes directories that appear when they are complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ktops.adapters.errors import AdapterError


@contextmanager
def new_directory(path: Path, *sources: Path) -> Iterator[Path]:
    """Yields a directory beside ``path`` to write to, which gets its name at the end.

    After an error, it is deleted.

    Raises:
        AdapterError: ``path`` exists, or contains a source or is contained in one.
    """
    for source in sources:
        one, other = path.resolve(), source.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise AdapterError(f"{path}: must not be {source}, nor inside it or around it")
    if path.exists():
        raise AdapterError(f"{path}: already exists. Choose another path, or delete it")
    partial = path.with_name(path.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
