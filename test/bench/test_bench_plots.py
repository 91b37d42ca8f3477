"""``bench.scaling`` and ``bench.plots``: points, figures, and the page generated from them."""

import pytest
import torch

import ktops
from bench import plots, report, results, scaling
from bench.machine import Calibration
from bench.measure import Plan
from bench.shapes import Shape

MACHINE = {
    "cpu": "Intel(R) Xeon(R) Gold 6000 CPU @ 2.00GHz",
    "threads": 2,
    "date": "2026-01-02",
    "torch": "2.13.0",
    "revision": "abc123",
    "peak_flop_per_second": {"scalar bfloat16": {"2": 3e10}},
    "l2_flop_per_second": {"scalar bfloat16": {"2": 2e10}},
    "read_bytes_per_second": {"2": 2.5e10},
}


def row(tokens: int, seconds: float, **more) -> dict:
    base = {
        "shape": "s", "mode": "forward", "tokens": tokens, "lora_rank": 0, "isa": "scalar", "status": "ok",
        "seconds": seconds, "limit_seconds": 0.001, "fraction": 0.001 / seconds, "save": "activations",
        "full": False, "routing": "random", "dtype": "bfloat16", "contestant": "ktops", "sweep": "tokens",
        "value": tokens, "layout": "plain",
    }  # fmt: skip
    return base | more


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Returns a results folder with a file per bench, of two runs."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    key = scaling.row_key
    results.save("run", MACHINE, "scalar", [row(1, 0.002), row(16, 0.004)], lambda r: (r["tokens"],))
    results.save(
        "run", {**MACHINE, "revision": "def456"}, "scalar", [row(16, 0.005)], lambda r: (r["tokens"],)
    )
    peers = [
        row(1, 0.002),
        row(1, 0.003, contestant="slower"),
        row(1, 0.0025, contestant="faster"),
        row(1, 0.0001, contestant="liar", status="wrong"),
    ]
    results.save("peers", {**MACHINE, "parity": "peers have A=B"}, "scalar", peers, lambda r: r["contestant"])
    results.save("scaling", MACHINE, "scalar", [row(1, 0.002), row(8, 0.004)], key)
    busy = {"ratio": 1.5, "ratio_min": 1.25, "ratio_max": 1.75, "seconds_busy": 0.003}
    results.save("busy_core", MACHINE, "scalar", [row(1, 0.002, **busy)], key)
    check = {"check": "c", "measured": 0.25, "bound": "at most", "limit": 0.5, "unit": "", "held": True}
    results.save("check", MACHINE, "scalar", [check], lambda r: (r["check"],))
    return tmp_path


def test_the_page_shows_what_the_files_hold(folder):
    page = "".join(
        f"text {name}\n<!-- begin {name} -->\nbefore\n<!-- end {name} -->\n" for name in plots.SECTIONS
    )
    rendered = plots.render(page, folder / "figures")
    assert "before" not in rendered and rendered.count("text ") == len(plots.SECTIONS)
    assert "| s | forward | 0 | 2 (0.50) | 5 (0.20) |" in rendered
    assert "| s | forward | 1 | 1 | 2 (0.50) | 2.5 (0.40) | WRONG | 3 (0.33) | 1.25 |" in rendered
    assert "| s | forward | 1 | scalar | 2.00 | 3.00 | 1.50 | 1.25..1.75 |" in rendered
    assert "| tokens | 8 | 4 (0.25) |" in rendered and "| c | 0.25 | at most 0.5 | yes |" in rendered
    assert "revision abc123, def456" in rendered
    assert "30 GFLOP/s in bfloat16 (20 with operands from L2) and 25.0 GB/s" in rendered
    assert "Peers have A=B." in rendered
    for name in ("run", "peers", "scaling"):
        figure = folder / "figures" / f"{name}-intel-xeon-gold-6000-2threads-scalar.svg"
        assert f"figures/{figure.name}" in rendered
        assert "</svg>" in figure.read_text()
    before = {file: file.read_bytes() for file in (folder / "figures").iterdir()}
    assert plots.render(rendered, folder / "figures") == rendered
    assert {file: file.read_bytes() for file in (folder / "figures").iterdir()} == before


def test_a_page_without_the_block_is_an_error():
    with pytest.raises(ValueError, match="begin peers"):
        plots.fill("text", "peers", "")


def test_without_results_the_page_says_how_to_measure(tmp_path):
    assert "python -m bench.run --save" in plots.section("run", tmp_path, tmp_path / "none")


def test_the_page_of_the_tree_is_made_from_its_results(tmp_path):
    page = plots.PAGE.read_text()
    assert plots.render(page, tmp_path) == page
    assert all((plots.FIGURES / file.name).exists() for file in tmp_path.iterdir())


def test_a_result_of_ktops_that_is_wrong_has_no_ratio():
    rows = [row(1, 0.002, status="wrong"), row(1, 0.003, contestant="other")]
    _, [line] = report.contest_table(rows)
    assert line[-1] == "-" and "WRONG" in line


def test_points_change_one_size_at_a_time():
    base = Shape("base", 64, 32, 16, 4)
    for sweep in scaling.SWEEPS:
        found = list(scaling.points(sweep, base, tokens=8, threads=6))
        for point in found:
            sizes = {
                "tokens": point.tokens,
                "lora_rank": point.rank,
                "threads": point.threads,
                "num_experts": point.shape.num_experts,
                "intermediate_size": point.shape.intermediate_size,
            }
            assert sizes.pop(sweep) == point.value
            usual = {"tokens": 8, "lora_rank": 16, "threads": 6, "num_experts": 16, "intermediate_size": 32}
            assert sizes == {name: usual[name] for name in sizes}
            assert (point.shape.hidden_size, point.shape.top_k) == (64, 4)
    assert [p.value for p in scaling.points("threads", base, 8, 6)] == [1, 2, 4, 6]
    assert scaling.values("num_experts", Shape("b", 8, 8, 64, 20), 1)[0] == 32


def test_scaling_end_to_end(tmp_path, monkeypatch):
    create = Calibration.__init__
    monkeypatch.setattr(Calibration, "__init__", lambda self, threads: create(self, threads, 1 << 20))
    monkeypatch.setattr("bench.machine._CALL_SECONDS", 0.001)
    monkeypatch.setattr(scaling, "Plan", lambda rounds, _, *rest: Plan(rounds, 0.0, *rest))
    monkeypatch.setattr(scaling, "SWEEPS", {**scaling.SWEEPS, "tokens": (1, 8), "lora_rank": (4, 8)})
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    arguments = ["--shape", "64,32,8,2", "--tokens", "8", "--rounds", "1", "--max-load", "inf", "--save"]
    threads = torch.get_num_threads()
    figure = tmp_path / "scaling.png"
    try:
        status = scaling.main(
            [*arguments, "--sweep", "tokens", "lora_rank", "--threads", "1", "--plot", str(figure)]
        )
    finally:
        torch.set_num_threads(threads)
    assert status == 0
    [record] = results.load("scaling", tmp_path)
    rows = record["rows"]
    assert record["isa"] == ktops.cpu_capability()
    assert [(r["sweep"], r["value"], r["mode"], r["tokens"], r["lora_rank"]) for r in rows] == [
        ("tokens", 1, "forward", 1, 0), ("tokens", 8, "forward", 8, 0),
        ("lora_rank", 4, "training", 8, 4), ("lora_rank", 8, "training", 8, 8),
        ("tokens", 1, "training", 1, 16), ("tokens", 8, "training", 8, 16),
    ]  # fmt: skip
    assert all(r["status"] == "ok" for r in rows)
    assert figure.read_bytes().startswith(b"\x89PNG")
