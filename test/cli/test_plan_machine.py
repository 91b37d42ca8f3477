"""The memory that ktops plan finds on a machine, in files of /proc and of cgroups."""

import pytest

from ktops.cli.plan.machine import Memory, read_memory

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """``machine(cgroup line, {path: contents})`` writes a machine of 64 GiB, 40 of them available."""

    def write(cgroup: str, files: dict[str, str]):
        lines = f"MemTotal: {64 << 20} kB\nMemAvailable: {40 << 20} kB\nHugePages_Total: 0\n"
        for name, text in {"proc/meminfo": lines, "proc/self/cgroup": cgroup, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def v2(folder: str, limit: str, usage: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {inactive}\nactive_file {active}\n"
    files = {"memory.max": f"{limit}\n", "memory.current": f"{usage}\n", "memory.stat": stat}
    return {f"sys/fs/cgroup/{folder}/{name}": text for name, text in files.items()}


def v1(folder: str, limit: int, usage: int, cache: int) -> dict[str, str]:
    files = {
        "memory.limit_in_bytes": str(limit),
        "memory.usage_in_bytes": str(usage),
        "memory.stat": f"total_inactive_file {cache}\ntotal_active_file 0\n",
    }
    return {f"sys/fs/cgroup/memory/{folder}/{name}": text for name, text in files.items()}


def test_without_a_limit_the_whole_machine(machine):
    assert read_memory(machine("0::/\n", {})) == Memory(64 * GIB, 40 * GIB)
    unlimited = v2("a", "max", 3 * GIB)
    assert read_memory(machine("0::/a\n", unlimited)) == Memory(64 * GIB, 40 * GIB)


def test_a_limit_leaves_what_is_not_used_and_the_page_cache(machine):
    files = v2("a", str(16 * GIB), usage=10 * GIB, inactive=3 * GIB, active=GIB)
    assert read_memory(machine("0::/a\n", files)) == Memory(16 * GIB, 10 * GIB, limited=True)


def test_the_lowest_limit_of_the_parents_and_the_least_that_is_left(machine):
    files = v2("a", str(20 * GIB), usage=18 * GIB) | v2("a/b", str(16 * GIB), usage=GIB)
    assert read_memory(machine("0::/a/b\n", files)) == Memory(16 * GIB, 2 * GIB, limited=True)


def test_a_limit_above_the_free_memory_adds_none(machine):
    files = v2("a", str(60 * GIB), usage=GIB)
    assert read_memory(machine("0::/a\n", files)) == Memory(60 * GIB, 40 * GIB, limited=True)


def test_version_1(machine):
    lines = "3:cpu,cpuacct:/x\n2:memory:/docker/b\n1:name=systemd:/docker/b\n"
    files = v1("docker/b", 8 * GIB, 6 * GIB, 2 * GIB) | v1("", (1 << 63) - 4096, 30 * GIB, GIB)
    assert read_memory(machine(lines, files)) == Memory(8 * GIB, 4 * GIB, limited=True)


def test_a_container_that_is_told_a_path_outside_of_it(machine):
    files = v2("", str(4 * GIB), usage=GIB)
    assert read_memory(machine("0::/system.slice/x.scope\n", files)) == Memory(4 * GIB, 3 * GIB, limited=True)


def test_unreadable_files_limit_nothing(machine):
    files = v2("a", "a lot", usage=GIB)
    assert read_memory(machine("0::/a\n", files)) == Memory(64 * GIB, 40 * GIB)


def test_a_machine_without_proc_asks_psutil(tmp_path):
    memory = read_memory(tmp_path)
    assert 0 < memory.available <= memory.total and not memory.limited
