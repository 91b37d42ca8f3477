"""Writes directories that appear when they are complete."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ktops.adapters.errors import AdapterError

LOCK = "ktops-writing"
"""The file that marks an incomplete directory; locked while a process writes to it."""


@contextmanager
def new_directory(path: Path, *sources: Path) -> Iterator[Path]:
    """Yields a directory beside ``path`` to write to, which gets its name at the end.

    After an error, it is deleted; what a killed process has left there, the next one deletes.

    Raises:
        AdapterError: ``path`` exists, or contains a source or is contained in one; another process writes it,
            or the directory beside it has other contents.
    """
    partial = path.with_name(path.name + ".partial")
    for source in sources:
        other = source.resolve()
        for mine in (path, partial):
            one = mine.resolve()
            if one == other or one in other.parents or other in one.parents:
                raise AdapterError(f"{mine}: must not be {source}, nor inside it or around it")
    if path.exists():
        raise AdapterError(f"{path}: already exists. Choose another path, or delete it")
    partial.mkdir(parents=True, exist_ok=True)
    lock = partial / LOCK
    if not lock.exists() and any(partial.iterdir()):
        raise AdapterError(
            f"{partial}: has contents, and {path} is written there first. Choose another path, or delete it"
        )
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AdapterError(f"{path}: another process is writing it") from None
        try:
            _clear(partial, lock)
            yield partial
            lock.unlink()
            partial.replace(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _clear(folder: Path, kept: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry != kept:
            entry.unlink()
