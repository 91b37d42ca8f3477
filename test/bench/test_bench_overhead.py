"""python -m bench.overhead, and the bound on what a call costs besides the work."""

import time

import torch

from bench import overhead
from ktops.testing.compare import one_thread

LIMIT = 15e-6
"""Of ktops.moe_sft for one token and a tiny layer, on a machine of its own."""


@one_thread()
def test_a_call_is_as_cheap_as_a_few_operators():
    """In units of F.linear of the same moment: machines differ, and so do moments of one.

    A busy hyper-thread on the same core doubles every time, for seconds: the fastest moment counts.
    """
    function, arguments = overhead.tiny_call()
    x = arguments[0]
    ratios, seconds = [], []
    with torch.no_grad():
        for _ in range(40):
            seconds.append(overhead.best_seconds(function, calls=100))
            ratios.append(seconds[-1] / overhead.best_seconds(lambda: torch.nn.functional.linear(x, x), 100))
            if min(seconds) < 2 * LIMIT and min(ratios) < 8:
                break
            time.sleep(0.2)
    assert min(seconds) < 2 * LIMIT
    assert min(ratios) < 8


def test_table(capsys, monkeypatch):
    monkeypatch.setattr(overhead, "_SERIES", 2)
    assert overhead.main(["--limit", "1e6"]) == 0
    out = capsys.readouterr().out
    assert "ktops.moe_sft" in out and "  arguments" in out
    assert overhead.main(["--limit", "0"]) == 1
