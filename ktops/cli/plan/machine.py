"""How much memory this machine has, and what of it a process can get, also within the limits of cgroups."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ktops._display import format_bytes

CGROUPS = Path("sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """The memory of a machine, in bytes.

    Attributes:
        total: of the machine, or the limit of a cgroup if that is lower.
        available: what a process can allocate now without swapping: free, or used by the page cache.
        limited: whether ``total`` is the limit of a cgroup.
    """

    total: int
    available: int
    limited: bool = False

    def __str__(self) -> str:
        of = "the limit of this cgroup is" if self.limited else "this machine has"
        return f"{format_bytes(self.available)} available ({of} {format_bytes(self.total)})"


@dataclass(frozen=True)
class _Files:
    """The names of a cgroup's files, and of the counters of page cache that it can give back."""

    limit: str
    usage: str
    cache: tuple[str, ...]


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


def read_memory(root: Path = Path("/")) -> Memory:
    """Reads ``/proc/meminfo`` and the cgroups of this process, versions 1 and 2, below ``root``.

    Example:
        >>> read_memory().available
        19327352832
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return _from_psutil()
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith("kB")}
    memory = Memory(sizes["MemTotal"], sizes["MemAvailable"])
    for limit, used in _limits(root):
        if limit < memory.total:
            memory = Memory(limit, memory.available, limited=True)
        memory = Memory(memory.total, min(memory.available, max(0, limit - used)), memory.limited)
    return memory


def _from_psutil() -> Memory:
    import psutil

    memory = psutil.virtual_memory()
    return Memory(memory.total, memory.available)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yields the limit of each cgroup of this process, and what it uses besides page cache."""
    for mount, path, files in _cgroups(root):
        folder = mount / path.lstrip("/")
        if not folder.is_dir():  # a container sees its own cgroup as the root, but may be told another path
            folder = mount
        while True:
            found = _limit(folder, files)
            if found is not None:
                yield found
            if folder == mount:
                break
            folder = folder.parent


def _cgroups(root: Path) -> Iterator[tuple[Path, str, _Files]]:
    """Yields where the memory controllers are mounted, and the path of this process below that."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield root / CGROUPS, path, _V2
        elif "memory" in controllers.split(","):
            yield root / CGROUPS / "memory", path, _V1


def _limit(folder: Path, files: _Files) -> tuple[int, int] | None:
    try:
        text = (folder / files.limit).read_text().strip()
        limit = None if text == "max" else int(text)
        usage = int((folder / files.usage).read_text())
        counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit is None:
        return None
    return limit, usage - sum(int(counters.get(name, 0)) for name in files.cache)


def anonymous_bytes() -> int:
    """Returns the memory of this process that no file holds."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import psutil

        return psutil.Process().memory_info().rss
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
