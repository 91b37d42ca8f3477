"""ktops.numa.nodes, on trees like /sys/devices/system."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ktops
from ktops.numa import topology
from ktops.numa.topology import format_list, parse_list, pretend, read_nodes, usable_memory

GIB = 1 << 30


def write_tree(root: Path, nodes: dict[int, str], memory_gib: int = 64, siblings: str = "") -> Path:
    """Writes a tree of nodes with these CPUs. siblings: the lists of CPUs that share a core, one a word."""
    for number, cpus in nodes.items():
        folder = root / "node" / f"node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
        size = memory_gib << 20
        (folder / "meminfo").write_text(
            f"Node {number} MemTotal:       {size} kB\nNode {number} MemFree:        1024 kB\n"
        )
    for name in ("possible", "online", "has_cpu"):  # files and folders that are no nodes
        (root / "node" / name).write_text("0-1\n")
    (root / "node" / "power").mkdir()
    for core in siblings.split():
        for cpu in parse_list(core):
            folder = root / "cpu" / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(core + "\n")
    return root


def cpus(found) -> dict[int, tuple[int, ...]]:
    return {node.id: node.cpus for node in found}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ({0: "0-3", 1: "4-7"}, {0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}),
        ({0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7"}, {0: (0, 4), 1: (1, 5), 2: (2, 6), 3: (3, 7)}),
        ({0: "0-5", 1: "6-7"}, {0: (0, 1, 2, 3, 4, 5), 1: (6, 7)}),
        ({0: "0-3", 1: "4-7", 2: "", 3: ""}, {0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}),  # memory only
        ({0: "", 8: "0-3", 10: "4-7"}, {8: (0, 1, 2, 3), 10: (4, 5, 6, 7)}),
    ],
)
def test_trees(tmp_path, nodes, expected):
    found = read_nodes(write_tree(tmp_path, nodes), range(8), None)
    assert cpus(found) == expected
    assert {node.memory_bytes for node in found} == {64 * GIB}
    assert not any(node.pretended for node in found)


def test_order_is_that_of_numbers(tmp_path):
    nodes = {number: str(number) for number in range(12)}
    assert list(cpus(read_nodes(write_tree(tmp_path, nodes), range(12), None))) == list(range(12))


@pytest.mark.parametrize(
    ("usable", "expected"),
    [
        ({1, 2, 6}, {0: (1, 2), 1: (6,)}),
        ({4, 5}, {1: (4, 5)}),  # as numactl --cpunodebind=1 leaves them
        ({3}, {0: (3,)}),
    ],
)
def test_only_cpus_that_may_be_used(tmp_path, usable, expected):
    tree = write_tree(tmp_path, {0: "0-3", 1: "4-7"})
    assert cpus(read_nodes(tree, usable, None)) == expected


def test_memory_that_may_not_be_used(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nMems_allowed:\t2\nMems_allowed_list:\t1-2\n")
    assert usable_memory(status) == {1, 2}
    tree = write_tree(tmp_path, {0: "0-3", 1: "4-7"})
    assert [node.memory_bytes for node in read_nodes(tree, range(8), usable_memory(status))] == [0, 64 * GIB]
    assert usable_memory(tmp_path / "missing") is None


def test_a_system_that_does_not_report_nodes_has_one(tmp_path):
    (node,) = read_nodes(tmp_path, {2, 5}, None)
    assert (node.id, node.cpus, node.memory_bytes) == (0, (2, 5), 0)


def test_cpus_of_a_core_stay_together(tmp_path):
    tree = write_tree(tmp_path, {0: "0-1,4-5", 1: "2-3,6-7"}, siblings="0,4 1,5 2,6 3,7")
    found = read_nodes(tree, range(8), None)
    assert [node.cores for node in found] == [((0, 4), (1, 5)), ((2, 6), (3, 7))]
    assert found[0].cpus == (0, 1, 4, 5)
    assert [node.cores for node in read_nodes(tree, {0, 2, 5, 6}, None)] == [((0,), (5,)), ((2, 6),)]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        ("1", [(0, 1, 2, 3, 4, 5)]),
        ("2", [(0, 1, 2), (3, 4, 5)]),
        ("4", [(0,), (1, 2), (3,), (4, 5)]),
        ("6", [(0,), (1,), (2,), (3,), (4,), (5,)]),
    ],
)
def test_pretended_nodes_are_parts_of_the_cpus_in_order(tmp_path, count, expected):
    found = read_nodes(write_tree(tmp_path, {0: "0-5"}), range(6), None)
    nodes = pretend(found, count)
    assert [node.cpus for node in nodes] == expected
    assert [node.id for node in nodes] == list(range(int(count)))
    assert all(node.pretended and node.memory_bytes == 64 * GIB // int(count) for node in nodes)


@pytest.mark.parametrize("count", ["0", "-1", "two", "7", "1.5"])
def test_numbers_that_cannot_be_pretended(tmp_path, count):
    found = read_nodes(write_tree(tmp_path, {0: "0-5"}), range(6), None)
    with pytest.raises(ValueError, match=f"KTOPS_NUMA_NODES must be .* from 1 to 6, .* got '{count}'"):
        pretend(found, count)


def test_the_environment_is_read_at_each_call(monkeypatch):
    monkeypatch.delenv(topology.VARIABLE, raising=False)
    assert not any(node.pretended for node in ktops.numa.nodes())
    monkeypatch.setenv(topology.VARIABLE, "1")
    (node,) = ktops.numa.nodes()
    assert node.pretended and set(node.cpus) == topology.usable_cpus()


@pytest.mark.parametrize("variable", [{}, {"OMP_PROC_BIND": "true"}])
def test_this_machine(variable):
    """All usable CPUs are CPUs of a node, also if OpenMP binds the first thread to one of them."""
    code = (
        "import os, json; before = os.sched_getaffinity(0)\n"
        "import ktops\n"
        "print(json.dumps([sorted(before), [node.cpus for node in ktops.numa.nodes()]]))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | variable
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True
    ).stdout
    before, found = json.loads(out)
    assert sorted(cpu for node in found for cpu in node) == before


@pytest.mark.parametrize("numbers", [[], [0], [0, 1, 2, 8], [1, 3, 5], list(range(100))])
def test_lists_of_numbers(numbers):
    assert parse_list(format_list(numbers)) == numbers
