"""The decoders of ggml's block formats return the bits that the gguf package does."""

import gguf
import numpy
import pytest
import torch

from ktops.formats import Codes, get_format
from ktops.formats.gguf_blocks import BLOCKS
from ktops.testing.weights import random_weight


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", ["random", "finite"])
def test_bits(name, kind):
    """With random bytes d and dmin may be NaN or infinite."""
    block, block_bytes = BLOCKS[name]
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 40, 2 * block_bytes), generator=generator, dtype=torch.uint8)
    if kind == "finite":
        blocks = random_weight(torch.randn(3, 40, 2 * block), name, 0).weight
    with numpy.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name.upper()])
    actual = get_format(name).dequantize(Codes(blocks), 2 * block, 0)
    expected = torch.from_numpy(expected).view(actual.shape)
    assert torch.equal(actual.isnan(), expected.isnan()) and bool(actual.isfinite().all()) == (
        kind == "finite"
    )
    known = ~actual.isnan()
    assert torch.equal(actual[known].view(torch.int32), expected[known].view(torch.int32))
