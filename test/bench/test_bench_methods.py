"""``python -m bench.methods`` with ktops in place of kt-kernel, which needs its own environment."""

import json
import sys

import pytest
import torch
from inside import Inside

import ktops
from bench import contest, methods, results
from bench.contest import Entrant
from bench.layer import Layer
from bench.peers.ktops_method import expert_weight
from bench.plots import fill
from bench.shapes import Shape
from ktops.testing.budgets import forward_budget

MACHINE = {"cpu": "a CPU", "threads": 1, "revision": "abc"}
ARGUMENTS = [
    "--shape", "64,32,8,2", "--tokens", "1", "20", "--rounds", "2", "--max-load", "inf", "--isa", "scalar",
    "--save", "--peer", f"kt-kernel={sys.executable}",
]  # fmt: skip
PAGE = "text\n<!-- begin methods scalar -->\n<!-- end methods scalar -->\n"


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    monkeypatch.setattr(methods, "Calibration", lambda threads: None)
    monkeypatch.setattr(results, "machine_record", lambda calibration: dict(MACHINE))
    monkeypatch.setattr(methods.report, "print_machine", lambda machine: None)
    monkeypatch.setattr(contest, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(methods, "SECONDS", 0.002)
    monkeypatch.setattr(methods, "Worker", Inside)
    monkeypatch.setattr(methods, "MODULES", dict.fromkeys(methods.MODULES, "ktops_method"))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(methods, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(Inside, "made", [])
    monkeypatch.setattr(Inside, "asked", [])
    monkeypatch.setattr(Inside, "spoil", None)
    methods.PAGE.write_text(PAGE)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*names) -> tuple[int, list[dict]]:
    """Returns (exit status, saved rows)."""
    status = methods.main([*ARGUMENTS, "--methods", *names])
    [record] = results.load("methods", results.RESULTS)
    return status, record["rows"]


def test_a_small_run(capsys):
    """All methods that support rows of 32 columns take turns; the page gets both tables."""
    names = [
        "BF16",
        "AMXINT8",
        "RAWINT4",
        "FP8_PERCHANNEL",
        "MXFP8",
        "AMXINT4_SFT",
        "AMXFP8_SFT",
        "MXFP4_SFT",
    ]
    status, rows = run(*names)
    assert status == 0
    assert [(row["method"], row["tokens"]) for row in rows] == sorted(
        ((name, tokens) for name in names for tokens in (1, 20)),
        key=lambda key: ("SFT" in key[0], *key),
    )
    for row in rows:
        assert 0 < row["speed_min"] <= row["speed"] <= row["speed_max"]
        assert 0 < row["ktops_error"] < methods.ROUNDED_ACTIVATIONS
    asked = [request["contestant"] for request in Inside.asked if request["do"] == "run"]
    assert asked[4:8] == ["ktops", "kt-kernel", "kt-kernel", "ktops"]
    page = methods.PAGE.read_text()
    forward, training = page.split("Training:")
    assert all(("SFT" in name) == (f"| {name} |" in training) for name in names)
    assert all(("SFT" not in name) == (f"| {name} |" in forward) for name in names)


def test_a_wrong_result_has_no_figure(monkeypatch):
    class Wrong:
        def __init__(self, contestant) -> None:
            self.contestant = contestant

        def forward(self, inputs):
            return self.contestant.forward(inputs) * 1.1

    monkeypatch.setattr(
        Inside, "spoil", staticmethod(lambda name, it: Wrong(it) if name == "kt-kernel" else it)
    )
    status, rows = run("RAWINT4")
    assert status == 0 and {row["peer"] for row in rows} == {"wrong"}
    assert not any("speed" in row for row in rows)
    assert "`RAWINT4`: ktops ok, kt-kernel wrong: output[0] is wrong" in methods.PAGE.read_text()
    monkeypatch.setattr(Inside, "spoil", staticmethod(lambda name, it: Wrong(it) if name == "ktops" else it))
    assert run("RAWINT4")[0] == 1


def test_what_kt_kernel_cannot_run_is_listed(monkeypatch, capsys):
    monkeypatch.setattr(methods, "MODULES", {"ktops": "ktops_method", "kt-kernel": "kt_kernel_method"})
    _, rows = run("MXFP4")
    assert {(row["status"], row["peer"]) for row in rows} == {("ok", "failed")}
    assert (
        "MXFP4: ktops ok, kt-kernel failed: ModuleNotFoundError: No module named 'kt_kernel'"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("BF16", 2 * forward_budget(torch.bfloat16), 2 * forward_budget(torch.bfloat16)),
        ("AMXINT4", 0.05, 0.5),
        ("RAWINT4", 0.05, 0.05),
        ("RAWINT4_SFT", 2 * forward_budget(torch.bfloat16), 0.05),
        ("LLAMAFILE", 0.05, 0.05),
    ],
)
def test_what_is_taken_for_right(name, ours, theirs):
    method = next(method for method in methods.METHODS if method.name == name)
    assert (methods.allowed(method, "ktops"), methods.allowed(method, "kt-kernel")) == (ours, theirs)


@pytest.mark.parametrize("method", {(m.format, m.group_size): m for m in methods.METHODS}.values(), ids=str)
def test_codes_in_the_file_are_those_of_the_reference(method, tmp_path):
    layer = Layer(Shape("tiny", 256, 256, 2, 1), 0)
    decoded = methods.quantized(layer, method, tmp_path / "codes.pt")
    stored = torch.load(tmp_path / "codes.pt", weights_only=True)
    for name in ("gate_up", "down"):
        assert torch.equal(
            expert_weight(stored[name]).dequantize(torch.bfloat16), getattr(decoded, f"{name}_proj")
        )


def test_speed_is_the_median_over_rounds():
    ours, theirs = Entrant("ktops", None), Entrant("kt-kernel", None)
    ours.samples = {0: [1.0, 1.0, 9.0], 1: [2.0], 2: [1.0]}
    theirs.samples = {0: [3.0], 1: [4.0], 3: [100.0]}
    assert methods.ratios(ours, theirs) == [3.0, 2.0]


def test_page_holds_the_saved_results(monkeypatch):
    folder = results.ROOT / "bench" / "results"
    monkeypatch.setattr(results, "RESULTS", folder)
    page = (results.ROOT / "docs" / "formats.md").read_text()
    measured = {json.loads(file.read_text())["isa"] for file in folder.glob("methods-*.json")}
    shown = {isa for isa in ktops.cpu_capabilities() if f"<!-- begin methods {isa} -->" in page}
    assert measured <= shown
    for isa in shown:
        assert fill(page, f"methods {isa}", methods.section(isa)) == page
