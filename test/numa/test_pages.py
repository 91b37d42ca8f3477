"""Pages of weights: which node they belong to, and the system calls that move them."""

import ctypes
import mmap
import os

import pytest
import torch
from fake_memory import LARGE, PAGE, FakeMemory

from ktops.numa import pages as pages_module
from ktops.numa import system
from ktops.numa.pages import homes_of_pages, locate, missing_bytes, move

MADV_HUGEPAGE = 14


def node_of_byte(tensor: torch.Tensor, parts: int, shares: list[int]) -> dict[int, int]:
    """The node of every byte of the rows of a tensor [E, rows, columns], as nodes.h defines the parts."""
    experts, rows, columns = tensor.shape
    size, found = tensor.element_size(), {}
    for expert in range(experts):
        for row in range(rows):
            in_part, before = row % (rows // parts), 0
            node = -1
            while in_part >= (rows // parts) * before // sum(shares):
                node += 1
                before += shares[node]
            first = tensor[expert, row].data_ptr()
            found |= dict.fromkeys(range(first, first + columns * size), node)
    return found


LAYOUTS = {
    "contiguous": (lambda: torch.zeros(3, 64, 200, dtype=torch.bfloat16), 2),
    "one part": (lambda: torch.zeros(2, 60, 512), 1),
    "distances between experts": (lambda: torch.zeros(3, 80, 300, dtype=torch.uint8)[:, :50], 2),
    "distances between rows": (lambda: torch.zeros(2, 40, 500)[:, :, :300], 1),
    "a row is larger than a page": (lambda: torch.zeros(2, 7, 3000), 1),
    "smaller than a page": (lambda: torch.zeros(2, 8, 4), 2),
    "rows that are not in two parts": (lambda: torch.zeros(4, 11, 2000), 2),
}  # fmt: skip


@pytest.mark.parametrize("shares", [[1, 1], [1, 2, 1], [1]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_page_belongs_to_the_node_of_its_middle(layout, shares):
    make, parts = LAYOUTS[layout]
    tensor = make()
    torch.ops.kt.set_numa_nodes([0], shares)
    found = node_of_byte(tensor, parts if tensor.shape[1] % parts == 0 else 1, shares)
    pages, homes = homes_of_pages(tensor, parts)
    assert set(pages.tolist()) == {byte // PAGE * PAGE for byte in found}
    assert (pages[1:] > pages[:-1]).all()
    first, last = min(found), max(found)
    for page, home in zip(pages.tolist(), homes.tolist(), strict=True):
        middle = min(max(page + PAGE // 2, first), last)
        before = [byte for byte in range(middle, first - 1, -1) if byte in found][:1]
        assert home == found[before[0]]


def anonymous(size: int) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def addresses(first: int, size: int) -> torch.Tensor:
    return torch.arange(first, first + size, PAGE)


def test_pages_of_this_process(movable):
    """Node 0 is the only one for sure; there, pages that have been written are."""
    memory, first = anonymous(1 << 20)
    pages = addresses(first, 1 << 20)
    assert missing_bytes(pages) == 1 << 20
    memory[: 1 << 19] = bytes([1]) * (1 << 19)
    assert missing_bytes(pages) == 1 << 19
    written = pages[: len(pages) // 2]
    moved = move(written, torch.zeros_like(written), read_missing=False)
    assert (moved.at_home, moved.by_node, moved.left) == (1 << 19, {0: 1 << 19}, {})
    assert set(locate(written).tolist()) == {0}
    assert memory[:4] == bytes([1]) * 4


def test_files_are_read_on_request(movable, policies, tmp_path):
    if not system.advise(0, 0, system.MADV_POPULATE_READ):
        pytest.skip("this kernel cannot read pages ahead (Linux 5.14 can)")
    path = tmp_path / "weights"
    content = os.urandom(1 << 20)
    path.write_bytes(content)
    with open(path, "rb") as file:
        memory = mmap.mmap(
            file.fileno(), 1 << 20, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    pages = addresses(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 1 << 20)
    homes = torch.zeros_like(pages)
    before = system.get_policy()
    assert move(pages, homes, read_missing=False).left == {"not in memory": 1 << 20}
    moved = move(pages, homes, read_missing=True)
    assert (moved.at_home, moved.left) == (1 << 20, {})
    assert system.get_policy() == before
    assert memory[:] == content


def large_page_bytes(address: int) -> int:
    """The size of the large pages in the mapping that holds an address."""
    size, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            name, *rest = line.split()
            if not name.endswith(":"):
                begin, end = (int(bound, 16) for bound in name.split("-"))
                inside = begin <= address < end
            elif inside and name == "AnonHugePages:":
                size += int(rest[0]) << 10
    return size


def test_large_pages_are_split():
    """Only the one that is asked for, and its bytes stay."""
    memory, first = anonymous(4 * LARGE)
    assert len(memory) == 4 * LARGE
    first = -(-first // LARGE) * LARGE
    system.advise(first, 2 * LARGE, MADV_HUGEPAGE)
    ctypes.memset(first, 7, 2 * LARGE)
    before = large_page_bytes(first)
    if before < 2 * LARGE:
        pytest.skip(f"the system has given large pages for {before} of {2 * LARGE} bytes")
    system.split_large_page(first + LARGE // 2)
    assert large_page_bytes(first) == before - LARGE
    assert ctypes.string_at(first, 2 * LARGE) == bytes([7]) * (2 * LARGE)


def halves(size: int, first: int = 1 << 30) -> tuple[torch.Tensor, torch.Tensor]:
    pages = addresses(first, size)
    return pages, (torch.arange(len(pages)) >= len(pages) // 2).long()


def test_pages_move_to_their_nodes(monkeypatch):
    monkeypatch.setattr(pages_module, "CHUNK", 3)
    fake = FakeMemory()
    fake.install(monkeypatch)
    pages, homes = halves(20 * PAGE)
    moved = move(pages, homes, read_missing=False)
    assert (moved.at_home, moved.left) == (20 * PAGE, {})
    assert moved.by_node == {0: 10 * PAGE, 1: 10 * PAGE}
    assert [fake.where(page) for page in pages.tolist()] == homes.tolist()


def test_only_large_pages_of_two_nodes_are_split(monkeypatch):
    fake = FakeMemory(is_large=True)
    fake.install(monkeypatch)
    pages, homes = halves(3 * LARGE)
    assert move(pages, homes, read_missing=False).at_home == 3 * LARGE
    assert fake.split == {(1 << 30) // LARGE + 1}


def test_what_is_left_is_said(monkeypatch):
    pages, homes = halves(20 * PAGE)
    after = pages[10:].tolist()
    fake = FakeMemory(shared=after[:2], busy=after[2:5], absent=after[5:6], room=3)
    fake.install(monkeypatch)
    moved = move(pages, homes, read_missing=False)
    assert moved.left == {
        "shared with other processes": 2 * PAGE,
        "in use by a device or the kernel": 3 * PAGE,
        "not in memory": PAGE,
        "no room on the node": PAGE,
    }
    assert moved.by_node == {0: 16 * PAGE, 1: 3 * PAGE}
    assert moved.at_home == 13 * PAGE


@pytest.mark.parametrize("step", [1, 2])
def test_what_is_absent_is_read_on_its_node(monkeypatch, step):
    """Pages of both nodes, in one piece and with others in between."""
    pages, homes = halves(20 * PAGE)
    fake = FakeMemory(absent=pages[4:16:step].tolist())
    fake.install(monkeypatch)
    read, advise = [], fake.advise
    monkeypatch.setattr(system, "advise", lambda *call: read.append(call[1] // PAGE) or advise(*call))
    assert missing_bytes(pages) == 12 // step * PAGE
    moved = move(pages, homes, read_missing=True)
    assert (moved.at_home, moved.left) == (20 * PAGE, {})
    assert fake.policy == system.Policy(system.MPOL_DEFAULT)
    assert [size for size in read if size] == ([6, 6] if step == 1 else [1] * 6)


@pytest.mark.parametrize("asked", [True, False])
def test_kernels_that_cannot_read_ahead(monkeypatch, asked):
    """It is said if reading was asked for, of the pages that are absent only."""
    pages, homes = halves(20 * PAGE)
    fake = FakeMemory(absent=pages[4:6].tolist(), shared=pages[10:11].tolist(), reads_ahead=False)
    fake.install(monkeypatch)
    reason = "not in memory (this kernel cannot read pages ahead; Linux 5.14 and later can)"
    assert move(pages, homes, read_missing=asked).left == {
        reason if asked else "not in memory": 2 * PAGE,
        "shared with other processes": PAGE,
    }
