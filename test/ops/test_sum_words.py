"""kt::sum_words, which reads memory for bench.machine, reads every word once."""

import pytest
import torch

BLOCK = 8 * 512
"""The number of words read in parallel streams: eight pages."""


@pytest.mark.parametrize("count", [0, 1, 511, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77])
def test_sum_of_every_word_modulo_2_64(count):
    generator = torch.Generator().manual_seed(count)
    storage = torch.randint(-(2**63), 2**63 - 1, (count + 1,), generator=generator)
    words = storage[1:]  # eight bytes past the start of a cache line
    assert torch.ops.kt.sum_words(words) == words.sum().item()


@pytest.mark.parametrize(
    "words, message",
    [
        (torch.ones(4), "words must be int64, got float32"),
        (torch.ones(4, 2, dtype=torch.int64), r"words must have shape \[num_words\], got \[4, 2\]"),
        (torch.ones(4, dtype=torch.int64)[::2], "words must be contiguous, got stride 2"),
    ],
)
def test_errors(words, message):
    with pytest.raises(RuntimeError, match=f"kt::sum_words: {message}"):
        torch.ops.kt.sum_words(words)
