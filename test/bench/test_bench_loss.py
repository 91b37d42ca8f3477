"""``python -m bench.loss``: its table, and that it compares the same loss."""

import pytest
import torch

from bench import loss


def test_table(capsys):
    sizes = ["--tokens", "8", "16", "--vocab-size", "50", "--hidden-size", "32", "--repeats", "1"]
    assert loss.main([*sizes, "--labels", "0.5"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        [tokens, *name.split()] for tokens in ("8", "16") for name in ("all logits", "in chunks")
    ]
    assert all(float(row[-1]) < torch.finfo(torch.bfloat16).eps for row in rows)


@pytest.mark.parametrize("other", [loss.in_chunks, loss.by_torch])
def test_losses_are_the_same(other):
    torch.manual_seed(0)
    hidden_states, head, targets = torch.randn(8, 16), torch.randn(50, 16), torch.randint(50, (8,))
    targets[:3] = -100
    torch.testing.assert_close(
        other(hidden_states, head, targets), loss.all_logits(hidden_states, head, targets)
    )
