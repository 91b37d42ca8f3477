"""``python -m bench.overhead``: table and exit status. ``test/ops/test_calls.py`` counts what a call does."""

import pytest
import torch

from bench import overhead


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(overhead, "_SERIES", 2)


def test_table(capsys):
    assert overhead.main(["--limit", "1000000"]) == 0
    out = capsys.readouterr().out
    assert "ktops.moe_sft" in out and "  arguments" in out and "limit 1e+06" in out
    assert overhead.main(["--limit", "0"]) == 1


def test_the_layer_of_operators_is_the_same_layer():
    function, arguments = overhead.tiny_call(torch.float32)
    assert torch.allclose(overhead.layer_of_operators(arguments), function(), rtol=1e-6)
    assert torch.equal(torch.ops.kt.moe_fwd(*arguments), function())
