"""Memory that ktops allocates for weights asks the system for huge pages."""

import ctypes
import mmap

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ktops
from ktops._huge_pages import in_huge_pages, stack_in_huge_pages
from ktops.nn.expert_list import KTExpert, KTExpertList, stacked_copy
from ktops.testing.pages import EXIST, HUGE_PAGE, asked_for_huge_pages, huge_page_of

E, SIZE = 17, 1024
"""[E, SIZE, SIZE] of bfloat16 is larger than 32 MiB, so glibc maps it alone."""


def asks(tensor: torch.Tensor) -> bool:
    return asked_for_huge_pages(huge_page_of(tensor))


def test_new_memory_is_asked_for():
    tensor = in_huge_pages(torch.empty(3, 1 << 23, dtype=torch.bfloat16))
    assert asks(tensor) == EXIST
    with mmap.mmap(-1, HUGE_PAGE) as other:
        assert not asked_for_huge_pages(ctypes.addressof(ctypes.c_char.from_buffer(other)))


@pytest.mark.parametrize("shape", [(0, 5), (7,), (1 << 20,)])
def test_tensors_that_may_hold_no_huge_page(shape):
    tensor = torch.empty(shape, dtype=torch.uint8)
    assert in_huge_pages(tensor) is tensor
    assert torch.equal(tensor.zero_(), torch.zeros(shape, dtype=torch.uint8))


def test_tensors_without_memory():
    assert in_huge_pages(torch.empty(2, 3, device="meta")).is_meta
    with FakeTensorMode():
        fake = torch.empty(2, 3)
        assert in_huge_pages(fake) is fake


def test_contiguous():
    with pytest.raises(
        RuntimeError, match=r"kt::ask_for_huge_pages: tensor must be contiguous, got one of shape \[3, 2\]"
    ):
        in_huge_pages(torch.empty(2, 3).t())


def test_stacks():
    rows = [[torch.randn(n, 4, requires_grad=True) for n in (2, 1)] for _ in range(3)]
    assert torch.equal(stack_in_huge_pages(rows), torch.stack([torch.cat(row) for row in rows]))
    mixed = [[torch.ones(1, 2).bfloat16(), torch.full((1, 2), 1 / 3)], [torch.ones(2, 2).bfloat16()]]
    assert torch.equal(stack_in_huge_pages(mixed), torch.stack([torch.cat(row).float() for row in mixed]))
    large = [[torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE)] for _ in range(E)]
    assert asks(stack_in_huge_pages(large)) == EXIST


def test_quantized_weights():
    weight = ktops.quantize(torch.randn(2, SIZE, SIZE).repeat(E, 1, 1), "int8")
    assert asks(weight.weight) == asks(weight.dequantize(torch.bfloat16)) == EXIST


def test_modules():
    experts = ktops.nn.KTExperts(E, SIZE, SIZE, dtype=torch.bfloat16)
    assert asks(experts.gate_up_proj) == asks(experts.down_proj) == EXIST
    linear = nn.Linear(SIZE, 34 * SIZE, bias=False, dtype=torch.bfloat16)
    assert asks(ktops.nn.Int8Linear.from_linear(linear).qweight) == EXIST


def test_lists_of_experts():
    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16)
            self.down = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16)
            self.act = nn.SiLU()

    experts = [KTExpert(MLP(), ("up", "down"), "act", "silu", "activations") for _ in range(E)]
    copy = stacked_copy(experts)
    assert all(asks(weight) == EXIST for weight in KTExpertList(experts).packed[:2])
    assert asks(copy.up_proj) == asks(copy.down_proj) == EXIST
