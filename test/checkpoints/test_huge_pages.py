"""Experts that are read into memory ask the system for huge pages."""

import pytest
import torch
from tiny_checkpoints import write_per_expert
from tiny_schemes import gptq, plain

from ktops.checkpoints import open_checkpoint
from ktops.testing.pages import EXIST, asked_for_huge_pages, huge_page_of


@pytest.mark.parametrize(
    ("dtype", "options"), [("gptq", {}), ("bf16", {"weight_format": "int8", "group_size": 128})]
)
def test_experts_that_are_read(tmp_path, dtype, options):
    make = gptq if dtype == "gptq" else plain(torch.bfloat16)
    write_per_expert(tmp_path, make, num_experts=8, hidden=1024, intermediate=1024, layers=1)
    experts = open_checkpoint(tmp_path).layers[0].read(**options)
    for weight in (experts.gate_up_proj, experts.down_proj):
        assert asked_for_huge_pages(huge_page_of(weight.weight)) == EXIST


def test_dense_experts_that_are_read(tmp_path):
    """Not mapped, because their parts do not begin at the same place of a page."""
    write_per_expert(tmp_path, plain(torch.bfloat16), num_experts=8, hidden=1000, intermediate=1000, layers=1)
    experts = open_checkpoint(tmp_path).layers[0].read()
    assert asked_for_huge_pages(huge_page_of(experts.gate_up_proj.weight)) == EXIST
