"""Experts that are read into memory ask the system for huge pages."""

import ctypes
import mmap
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import write_per_expert
from tiny_schemes import gptq, plain

from ktops.checkpoints import huge_pages, open_checkpoint

EXIST = Path("/sys/kernel/mm/transparent_hugepage").exists()
"""Whether the system has huge pages to ask for."""


def asked_for_huge_pages(address: int) -> bool:
    """Returns whether the mapping that contains an address has the flag of MADV_HUGEPAGE."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(number, 16) for number in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in rest
    raise AssertionError(f"no mapping contains {address:#x}")


def huge_page_of(tensor: torch.Tensor) -> int:
    """Returns the address of the first whole huge page of a tensor."""
    return -(-tensor.data_ptr() // huge_pages.HUGE_PAGE) * huge_pages.HUGE_PAGE


def test_empty():
    tensor = huge_pages.empty((3, 1 << 21), torch.bfloat16)
    assert tensor.shape == (3, 1 << 21) and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
    assert asked_for_huge_pages(huge_page_of(tensor)) == EXIST
    with mmap.mmap(-1, huge_pages.HUGE_PAGE) as other:
        assert not asked_for_huge_pages(ctypes.addressof(ctypes.c_char.from_buffer(other)))


@pytest.mark.parametrize("shape", [(0, 5), (7,), (1 << 20,)])
def test_tensors_that_may_hold_no_huge_page(shape):
    tensor = huge_pages.empty(shape, torch.uint8)
    assert tensor.shape == shape and torch.equal(tensor.zero_(), torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("dtype", "options"), [("gptq", {}), ("bf16", {"weight_format": "int8", "group_size": 128})]
)
def test_experts_that_are_read(tmp_path, dtype, options):
    make = gptq if dtype == "gptq" else plain(torch.bfloat16)
    write_per_expert(tmp_path, make, num_experts=8, hidden=1024, intermediate=1024, layers=1)
    experts = open_checkpoint(tmp_path).layers[0].read(**options)
    for weight in (experts.gate_up_proj, experts.down_proj):
        codes = weight.weight
        assert codes.nbytes >= 2 * huge_pages.HUGE_PAGE - 1
        assert asked_for_huge_pages(huge_page_of(codes)) == EXIST


def test_dense_experts_that_are_read(tmp_path):
    """Not mapped, because their parts do not begin at the same place of a page."""
    write_per_expert(tmp_path, plain(torch.bfloat16), num_experts=8, hidden=1000, intermediate=1000, layers=1)
    experts = open_checkpoint(tmp_path).layers[0].read()
    assert asked_for_huge_pages(huge_page_of(experts.gate_up_proj.weight)) == EXIST
