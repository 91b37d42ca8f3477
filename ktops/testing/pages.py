"""Tells which memory the system has been asked to back with huge pages."""

from pathlib import Path

from torch import Tensor

HUGE_PAGE = 2 << 20

EXIST = Path("/sys/kernel/mm/transparent_hugepage").exists()
"""Whether the system has huge pages to ask for."""


def asked_for_huge_pages(address: int) -> bool:
    """Returns whether the mapping that contains an address was advised with MADV_HUGEPAGE."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(number, 16) for number in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in rest
    raise AssertionError(f"no mapping contains {address:#x}")


def huge_page_of(tensor: Tensor) -> int:
    """Returns the address of the first whole huge page of a tensor large enough to have one."""
    assert tensor.nbytes >= 2 * HUGE_PAGE - 1
    return -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
