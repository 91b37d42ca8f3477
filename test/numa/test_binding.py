"""ktops.numa.bind_rank: which CPUs, threads and memory a process of several gets."""

import errno
import json
import os
import subprocess
import sys

import pytest

from ktops._warn import warn_once
from ktops.numa import binding, system, topology
from ktops.numa.binding import share
from ktops.numa.topology import STATUS, SYSTEM, Node, pretend, read_nodes, usable_memory
from ktops.testing.torchrun import torchrun

SHOW = """
import json, os, sys, threading, warnings
import torch
import ktops
from ktops.numa import system

def policy():
    try:
        return system.get_policy()
    except OSError:
        return None

def show(**more):
    tasks = {int(name) for name in os.listdir("/proc/self/task")}
    policies = []
    thread = threading.Thread(target=lambda: policies.append(policy()))
    thread.start()
    thread.join()
    print(json.dumps({
        "cpus": sorted(os.sched_getaffinity(0)),
        "of_threads": sorted({tuple(sorted(os.sched_getaffinity(task))) for task in tasks}),
        "threads": torch.get_num_threads(),
        "policy": policy(),
        "policy_of_new_thread": policies[0],
        **more,
    }))
"""
MACHINE = sorted(os.sched_getaffinity(0))
NODES = read_nodes(SYSTEM, MACHINE, usable_memory(STATUS))
CORES = [core for node in NODES for core in node.cores]


@pytest.fixture
def two_cores() -> None:
    if len(CORES) < 2:
        pytest.skip("needs two cores, for a rank each")


@pytest.fixture
def two_cpus() -> None:
    if len(MACHINE) < 2:
        pytest.skip("needs two CPUs, to be bound to one")


def run(
    code: str, *, fails: bool = False, command: tuple[str, ...] = (), **environment: object
) -> dict | str:
    """Runs code after SHOW as rank LOCAL_RANK; returns what it showed, or what it wrote to stderr."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("LOCAL_", "KTOPS_"))}
    given = {key: str(value) for key, value in environment.items()}
    result = subprocess.run(
        [*command, sys.executable, "-c", SHOW + code],
        env=inherited | {"OMP_NUM_THREADS": "1"} | given,
        capture_output=True,
        text=True,
    )
    assert (result.returncode != 0) == fails, result.stderr
    return result.stderr if fails else json.loads(result.stdout) | {"stderr": result.stderr}


def half(rank: int, nodes: tuple[Node, ...] = NODES) -> tuple[list[int], int]:
    """The CPUs and the number of cores of a rank of two: half of the nodes, or cores of the only one."""
    whole = nodes if len(nodes) > 1 else nodes[0].cores
    part = whole[rank * len(whole) // 2 : (rank + 1) * len(whole) // 2]
    cores = [core for node in part for core in node.cores] if len(nodes) > 1 else part
    return sorted(cpu for core in cores for cpu in core), len(cores)


def expected_policy(rank: int) -> list | None:
    """What bind_rank sets in a rank of two; None if the system forbids it."""
    try:
        system.set_policy(system.get_policy())
    except OSError as error:
        assert error.errno in (errno.EPERM, errno.ENOSYS)
        return None
    found = [node for node in NODES if set(node.cpus) & set(half(rank)[0])]
    if len(found) > 1 or not found[0].memory_bytes:
        return [system.MPOL_LOCAL, []]
    return [system.MPOL_PREFERRED, [found[0].id]]


def node(number: int, cores: int, first: int = 0, threads: int = 1) -> Node:
    cpus = (tuple(first + core + cores * thread for thread in range(threads)) for core in range(cores))
    return Node(number, tuple(cpus), 1 << 30)


TWO = [node(0, 4), node(1, 4, first=4)]
UNEVEN = [node(0, 6), node(1, 2, first=6)]


def parts(nodes: list[Node], size: int) -> list[dict[int, tuple[int, ...]]]:
    return [{part.id: part.cpus for part in share(nodes, rank, size)} for rank in range(size)]


def test_a_rank_per_node():
    assert parts(TWO, 2) == [{0: (0, 1, 2, 3)}, {1: (4, 5, 6, 7)}]


def test_more_nodes_than_ranks():
    assert parts(TWO, 1) == [{0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}]
    three = [node(number, 2, first=2 * number) for number in range(3)]
    assert parts(three, 2) == [{0: (0, 1)}, {1: (2, 3), 2: (4, 5)}]


def test_more_ranks_than_nodes():
    assert parts(TWO, 4) == [{0: (0, 1)}, {0: (2, 3)}, {1: (4, 5)}, {1: (6, 7)}]
    assert parts(TWO, 3) == [{0: (0, 1)}, {0: (2, 3)}, {1: (4, 5, 6, 7)}]
    assert parts(UNEVEN, 4) == [{0: (0, 1)}, {0: (2, 3)}, {0: (4, 5)}, {1: (6, 7)}]
    assert parts([node(0, 5)], 2) == [{0: (0, 1)}, {0: (2, 3, 4)}]


def test_threads_of_a_core_stay_together():
    assert parts([node(0, 4, threads=2)], 2) == [{0: (0, 1, 4, 5)}, {0: (2, 3, 6, 7)}]


@pytest.mark.parametrize("nodes", [TWO, UNEVEN, [node(0, 5)], [node(3, 3, threads=2)]])
@pytest.mark.parametrize("size", range(1, 20))
def test_parts_are_disjoint_while_there_are_cores(nodes, size):
    cores = [core for each in nodes for core in each.cores]
    given = [[core for part in share(nodes, rank, size) for core in part.cores] for rank in range(size)]
    assert all(given)
    if size <= len(cores) and size <= len(nodes) * min(len(each.cores) for each in nodes):
        assert sorted(core for part in given for core in part) == sorted(cores)
    assert {core for part in given for core in part} == set(cores)


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_on_this_machine(two_cores, rank):
    """Threads that exist and those to come, processes that it starts, and memory of the node."""
    code = """
torch.set_num_threads(2)
torch.zeros(1 << 20)  # starts a thread
binding = ktops.numa.bind_rank()
child = "import os; print(sorted(os.sched_getaffinity(0)))"
import subprocess
show(text=str(binding), node=binding.memory_node, again=ktops.numa.bind_rank() is binding,
     child=subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
"""
    shown = run(code, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2)
    cpus, cores = half(rank)
    assert shown["cpus"] == cpus and shown["of_threads"] == [cpus]
    assert shown["threads"] == cores
    assert shown["child"] == f"{cpus}\n"
    assert f"rank {rank} of 2 on this host: node" in shown["text"] and shown["again"]
    expected = expected_policy(rank)
    if expected is None:
        assert shown["node"] is None and "the memory policy stays as it is" in shown["stderr"]
    else:
        assert shown["policy"] == shown["policy_of_new_thread"] == expected
        assert shown["node"] == (expected[1][0] if expected[1] else None)
        assert shown["stderr"] == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_the_variable_binds_on_import(two_cores, rank):
    """OMP_NUM_THREADS=1 of torchrun does not count. Processes that the rank starts keep its part whole."""
    code = f"""
import subprocess
inner = "import os, ktops; print(sorted(os.sched_getaffinity(0)))"
show(child=subprocess.run([sys.executable, "-c", inner], capture_output=True, text=True, check=True).stdout)
assert torch.ops.kt.numa_rows(4) == []
assert ktops.numa.bind_rank().local_rank == {rank}
"""
    environment = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "KTOPS_NUMA_BIND": 1, "KTOPS_NUMA_NODES": 2}
    shown = run(code, **environment)
    cpus, cores = half(rank, pretend(NODES, "2"))
    assert shown["cpus"] == cpus and shown["threads"] == cores
    assert shown["child"] == f"{cpus}\n"
    unbound = run("show()", LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2)
    assert shown["policy"] == unbound["policy"]  # the nodes are pretended
    assert shown["stderr"] == ""


def test_ranks_of_torchrun(two_cores, tmp_path):
    """Which leaves their CPUs alone, sets OMP_NUM_THREADS=1, and is not bound itself."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import json, os, pathlib, torch, ktops\n"
        "shown = [sorted(os.sched_getaffinity(0)), torch.get_num_threads()]\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['LOCAL_RANK']).write_text(json.dumps(shown))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment["KTOPS_NUMA_BIND"] = "1"
    subprocess.run(torchrun(2, script), env=environment, check=True, capture_output=True)
    for rank in range(2):
        assert json.loads((tmp_path / str(rank)).read_text()) == list(half(rank))


@pytest.mark.parametrize("rank", [0, 1])
def test_pretended_nodes_of_a_bound_process(two_cores, rank):
    """It has the node that it got, and does not pretend as many again among the CPUs that are left."""
    code = "ktops.numa.bind_rank(); show(nodes=[list(node.cpus) for node in ktops.numa.nodes()])"
    shown = run(code, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2, KTOPS_NUMA_NODES=2)
    assert isinstance(shown, dict) and shown["nodes"] == [shown["cpus"]]


@pytest.mark.parametrize(
    ("rank", "size", "name"), [("0", 2, "local_rank"), (True, 2, "local_rank"), (0, 2.0, "local_world_size")]
)
def test_numbers_of_another_type(rank, size, name):
    with pytest.raises(TypeError, match=f"bind_rank: {name} must be an int"):
        binding.bind_rank(rank, size)


def test_one_rank_gets_all():
    shown = run("ktops.numa.bind_rank(0, 1); show()")
    assert shown["cpus"] == MACHINE and shown["threads"] == len(CORES)


@pytest.mark.parametrize("asked", ["", "0"])
def test_not_asked(asked):
    assert run("show()", LOCAL_RANK=0, LOCAL_WORLD_SIZE=2, KTOPS_NUMA_BIND=asked)["cpus"] == MACHINE


def test_a_process_that_is_no_rank_is_not_bound():
    assert run("show()", KTOPS_NUMA_BIND=1)["cpus"] == MACHINE


def test_more_ranks_than_cores():
    """Every rank gets a core; one of them warns."""
    size = 2 * len(CORES)
    warning = f"{size} processes share {len(CORES)} cores"
    for rank in (0, size - 1):
        shown = run("ktops.numa.bind_rank(); show()", LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size)
        assert shown["threads"] == 1 and tuple(shown["cpus"]) in CORES
        assert shown["stderr"].count(warning) == (rank == 0)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "bind_rank: local_rank must be given, or be in the environment as LOCAL_RANK, .* got ''"),
        ({"LOCAL_RANK": 0}, "bind_rank: local_world_size must be given, .* LOCAL_WORLD_SIZE, .* got ''"),
        ({"LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": 2}, "local_rank must be .* got 'x'"),
        ({"LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 2}, r"must be in \[0, local_world_size=2\), got 2"),
    ],
)
def test_unknown_ranks(monkeypatch, environment, message):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=message):
        binding.bind_rank()
    assert sorted(os.sched_getaffinity(0)) == MACHINE


def test_another_value_of_the_variable(monkeypatch):
    monkeypatch.setenv(binding.VARIABLE, "yes")
    with pytest.raises(ValueError, match="KTOPS_NUMA_BIND must be 0 or 1, got 'yes'"):
        binding.bind_if_asked()


def test_a_process_that_is_bound_already(two_cpus):
    """By torchrun --numa-binding, say: halving its CPUs once more would leave half of them idle."""
    bound = f"import os, sys; os.sched_setaffinity(0, [{MACHINE[0]}]); os.execv(sys.argv[1], sys.argv[1:])"
    error = run(
        "ktops.numa.bind_rank(); show()",
        fails=True,
        command=(sys.executable, "-c", bound),
        LOCAL_RANK=0,
        LOCAL_WORLD_SIZE=2,
    )
    assert f"bind_rank: this process may only use CPUs {MACHINE[0]}, and the one that started it" in error
    assert "Leave one of the two out" in error


def test_a_launcher_whose_cpus_are_not_told(monkeypatch):
    """Security modules may forbid it; then the process may be bound."""

    def affinity(thread: int) -> set[int]:
        if thread == os.getppid():
            raise PermissionError
        return {0}

    monkeypatch.setattr(topology, "affinity", affinity)
    binding._require_unbound(2)


def test_another_rank_later():
    error = run("ktops.numa.bind_rank(0, 2); ktops.numa.bind_rank(1, 2)", fails=True)
    assert "bind_rank: this process is bound already, as rank 0 of 2" in error


def test_a_system_that_refuses_policies(monkeypatch):
    """Containers without SYS_NICE. Binding to CPUs works there."""

    def refuse(policy):
        raise OSError(errno.EPERM, "set_mempolicy: Operation not permitted")

    monkeypatch.setattr(system, "set_policy", refuse)
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"the memory policy stays as it is \(set_mempolicy: Operation not"):
        assert binding._prefer_memory([node(0, 2)]) is None


def test_policies_are_read_back(policies):
    before, node = system.get_policy(), next(node.id for node in NODES if node.memory_bytes)
    try:
        for policy in (
            system.Policy(system.MPOL_PREFERRED, (node,)),
            system.Policy(system.MPOL_BIND, (node,)),
            system.Policy(system.MPOL_INTERLEAVE, (node,)),
            system.Policy(system.MPOL_LOCAL),
        ):
            system.set_policy(policy)
            assert system.get_policy() == policy
    finally:
        system.set_policy(before)
    assert system.get_policy() == before
