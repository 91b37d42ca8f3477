"""``python -m bench.check``: figures, exit status, file. Whether a check holds depends on the machine."""

import math

import pytest

import ktops
from bench import busy_core, check, machine, overhead, plots, regression, results
from bench.check import Check
from bench.machine import Calibration
from bench.shapes import Shape

MACHINE = {
    "cpu": "a CPU",
    "threads": 2,
    "date": "2026-01-02",
    "torch": "2.13.0",
    "revision": "abc",
    "peak_flop_per_second": {},
    "read_bytes_per_second": {"2": 1e9},
}


@pytest.fixture
def _small(monkeypatch):
    """The figures mean nothing here."""
    create = Calibration.__init__
    monkeypatch.setattr(Calibration, "__init__", lambda self, threads, _=None: create(self, threads, 1 << 20))
    monkeypatch.setattr(machine, "_CALL_SECONDS", 0.001)
    monkeypatch.setattr(overhead, "_SERIES", 1)
    monkeypatch.setattr(busy_core, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(check, "SHAPE", Shape("small", 64, 32, 8, 2))
    monkeypatch.setattr(check, "WIDE", Shape("wide", 16, 64, 4, 2))
    monkeypatch.setattr(check, "TOKENS", 8)
    monkeypatch.setattr(check, "ROUNDS", 1)


def found(*checks: Check):
    return (lambda: iter(checks),)


@pytest.mark.usefixtures("_small")
def test_every_check_gives_its_figures():
    rows = []
    for function in check.CHECKS:
        found = [one.row() for one in function()]
        assert found or function in (
            check.order_of_rows,
            check.tasks_at_home,
        )  # need both ISAs, several cores
        rows += found
    assert all(math.isfinite(row["measured"]) and row["limit"] > 0 for row in rows)
    names = [row["check"] for row in rows]
    assert len(set(names)) == len(names)
    for words in ("tiny layer", "outside its steps", "fastest product", "busy core", "resident memory"):
        assert any(words in name for name in names)


@pytest.mark.parametrize(
    ("checks", "status"),
    [
        ([Check("a", 1, 2), Check("b", 2, 1, at_least=True)], 0),
        ([Check("a", 3, 2), Check("b", 2, 1, at_least=True)], 1),
        ([Check("a", 1, 2), Check("b", 0.5, 1, at_least=True)], 1),
        ([Check("a", 3, 2, excused=True)], 0),
        ([Check("a", math.nan, 2)], 1),
    ],
)
def test_exit_status(monkeypatch, capsys, checks, status):
    monkeypatch.setattr(check, "CHECKS", found(*checks))
    assert check.main([]) == status
    out = capsys.readouterr().out
    assert ("NO" in out) == ("failed" in out) == (status == 1)


def test_another_revision(monkeypatch, capsys):
    rows = [
        {"tokens": 1, "mode": "forward", "ratio": 1.2, "status": "ok"},
        {"tokens": 1, "mode": "training", "ratio": 0.9, "status": "ok"},
    ]
    asked = []
    monkeypatch.setattr(check, "CHECKS", ())
    monkeypatch.setattr(regression, "measure", lambda arguments: asked.append(arguments.revisions) or rows)
    assert check.main(["--against", "v1"]) == 0
    assert asked == [["v1", "HEAD"]] and "relative to v1" in capsys.readouterr().out
    for worse in ({"ratio": 1.2, "status": "slower"}, {"status": "wrong"}, {"status": "busy"}):
        rows[1] = {"tokens": 1, "mode": "training", **worse}
        assert check.main(["--against", "v1"]) == 1


def test_saved_rows_are_on_the_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(check, "Calibration", lambda threads: None)
    monkeypatch.setattr(results, "machine_record", lambda calibration: dict(MACHINE))
    monkeypatch.setattr(check, "CHECKS", found(Check("a", 12.34, 15, "us"), Check("b", 0, 1, at_least=True)))
    assert check.main(["--save"]) == 1
    [record] = results.load("check", tmp_path)
    assert record["isa"] == ktops.cpu_capability()
    assert [(row["check"], row["held"]) for row in record["rows"]] == [("a", True), ("b", False)]
    section = plots.section("check", tmp_path)
    assert "| a | 12.3 us | at most 15 us | yes |" in section and "| b | 0 | at least 1 | NO |" in section
