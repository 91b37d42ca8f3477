"""A process that keeps a core busy, and the bench's evaluation of times."""

import os
from pathlib import Path

import pytest

from bench import busy_core
from bench.busy_core import Burner, slowdown


def state(burner: Burner) -> str:
    """Returns "R" or "S" for a running process, "T" for a stopped one."""
    return Path(f"/proc/{burner._process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_the_burning_process_burns_during_the_busy_sample_only(monkeypatch):
    """Uses a clock that advances by 1 in a quiet call and by 3 in a busy one."""
    states, clock = [], [0.0]
    monkeypatch.setattr(busy_core.time, "perf_counter", lambda: clock[0])
    with Burner() as burner:
        pid = burner._process.pid

        def call():
            states.append(state(burner))
            clock[0] += 1.0 if states[-1] == "T" else 3.0

        assert slowdown(call, burner, calls=3) == (1.0, 3.0)
        assert state(burner) == "T"
    assert states == ["T"] * 3 + ["R"] * 3 + ["T"] * 3
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_reports_a_ratio_above_the_limit(capsys, monkeypatch):
    arguments = [
        "--shape",
        "64,32,8,2",
        "--tokens",
        "4",
        "--rounds",
        "2",
        "--calls",
        "1",
        "--mode",
        "forward",
    ]
    monkeypatch.setattr(busy_core, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(busy_core, "slowdown", lambda *_: (1.0, 3.0))
    assert busy_core.main(arguments) == 1
    assert "3.00" in capsys.readouterr().out
    assert busy_core.main([*arguments, "--limit", "4"]) == 0
