"""Threads take the tasks of their own node first, then those of others; ``test/homes.cpp``."""

import subprocess

import pytest
from programs import compiled

SOURCES = ("core/environment.cpp", "parallel/profile.cpp", "parallel/clock.cpp", "parallel/nodes.cpp")
PHASES = 2


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = compiled("homes", tmp_path_factory.mktemp("homes"), *SOURCES)

    def run(*arguments: object) -> list[str]:
        result = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True)
        assert result.returncode == 0, f"status {result.returncode}, see homes.cpp"
        return result.stdout.splitlines()

    return run


def node_of_row(row: int, rows: int, shares: list[int]) -> int:
    """The node whose part of the rows holds a row, as nodes.h defines the parts."""
    before = 0
    for node, share in enumerate(shares):
        before += share
        if row < rows * before // sum(shares):
            return node
    raise AssertionError


@pytest.mark.parametrize("shares", [[1, 1], [1, 1, 1, 1], [3, 1], [5, 2, 1], [1] * 9])
@pytest.mark.parametrize(
    ("rows", "width"), [(768, 64), (768, 256), (1408, 256), (100, 16), (64, 64), (7, 16)]
)
def test_a_task_belongs_to_the_node_of_its_middle_row(program, rows, width, shares):
    (line,) = program("slabs", rows, width, 16, *shares)
    _, slabs, *first = map(int, line.split())
    assert slabs == -(-rows // width)
    for slab in range(slabs):
        begin, end = slab * width, min(rows, (slab + 1) * width)
        home = max(node for node in range(len(shares)) if first[node] <= slab)
        assert home == node_of_row((begin + end) // 2, rows, shares)


@pytest.mark.parametrize(("rows", "width"), [(768, 64), (768, 256), (1408, 256), (2880, 128), (7168, 256)])
@pytest.mark.parametrize("nodes", [2, 4])
def test_slabs_end_where_nodes_do(program, rows, width, nodes):
    """With equal parts, all nodes get the same number of tasks, and at most a panel of rows is remote."""
    shares = [1] * nodes
    narrower = int(program("slabs", rows, width, 16, *shares)[0].split()[0])
    assert narrower <= width and narrower % 16 == 0
    _, slabs, *first = map(int, program("slabs", rows, narrower, 16, *shares)[0].split())
    counts = [end - begin for begin, end in zip(first, [*first[1:], slabs], strict=True)]
    assert max(counts) - min(counts) <= 1
    for node, begin in enumerate(first):
        assert abs(begin * narrower - rows * node // nodes) <= 16 * nodes


def test_the_task_after_a_task_is_the_next_of_its_node(program):
    for arguments in [(3, 768, 64, 1, 1), (5, 640, 64, 1, 1, 1), (4, 100, 16, 1, 1), (1, 16, 16, 1)]:
        program("after", *arguments)


def parse(lines: list[str], threads: int) -> tuple[list[tuple[int, ...]], list[list[list[int]]]]:
    """Returns (tasks, at_home, stolen) of both phases, and the tasks that each thread ran in each."""
    rows = [line.split() for line in lines[: -PHASES * threads]]
    numbers = [(int(row[3]), int(row[7]), int(row[8])) for row in rows if row[1] in ("first", "second")]
    taken = [list(map(int, line.split())) for line in lines[-PHASES * threads :]]
    return numbers, [taken[:threads], taken[threads:]]


def slabs_of(node: int, tasks, slabs: int, nodes: int):
    return [task for task in tasks if slabs * node // nodes <= task % slabs < slabs * (node + 1) // nodes]


def test_one_thread_takes_the_tasks_of_its_node_then_the_others(program):
    numbers, phases = parse(program("run", "free", 1, 3, 64, 16, 1, 1), 1)
    assert phases == [[[0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]]] * PHASES
    assert numbers == [(12, 6, 6)] * PHASES


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_undisturbed_threads_run_every_task_at_home(program, nodes):
    """All threads work at the same speed, one on each node."""
    groups, slabs = 5, 2 * nodes
    numbers, phases = parse(program("run", "even", nodes, groups, slabs * 16, 16, *[1] * nodes), nodes)
    assert numbers == [(groups * slabs, groups * slabs, 0)] * PHASES
    for threads in phases:
        nodes_of_threads = [{task % slabs // 2 for task in taken} for taken in threads]
        assert sorted(map(list, nodes_of_threads)) == [[node] for node in range(nodes)]


@pytest.mark.parametrize(("nodes", "threads"), [(2, 2), (2, 4), (3, 3), (3, 5)])
def test_threads_that_are_held_up_keep_one_task_each(program, nodes, threads):
    """The threads of node 0 run all other tasks; without stealing, they would wait for ever."""
    groups, slabs = 4, 6
    numbers, phases = parse(program("run", "held", threads, groups, slabs * 16, 16, *[1] * nodes), threads)
    held = threads - -(-threads // nodes)
    at_home = groups * slabs // nodes + held
    assert numbers == [(groups * slabs, at_home, groups * slabs - at_home)] * PHASES
    for taken in phases:
        assert sum(len(tasks) == 1 for tasks in taken) >= held


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("shares", [[1], [1, 1], [1, 3], [1, 1, 1], [1] * 12])
def test_every_task_runs_once(program, threads, shares):
    """Also with fewer slabs than nodes, and fewer threads than nodes."""
    for groups, rows in ((1, 16), (3, 80), (2, 1000)):
        numbers, phases = parse(program("run", "free", threads, groups, rows, 16, *shares), threads)
        tasks = groups * -(-rows // 16)
        for (count, at_home, stolen), taken in zip(numbers, phases, strict=True):
            assert sorted(task for tasks in taken for task in tasks) == list(range(tasks))
            assert (count, at_home + stolen) == (tasks, 0 if len(shares) == 1 else tasks)
