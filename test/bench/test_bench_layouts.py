"""``bench.layouts``, and ``bench.run`` with layouts and float16: what is called, compared and saved."""

import itertools
import json

import pytest
import torch

import ktops
from bench import layouts, measure, moe_fwd, moe_sft, results, run
from bench.layer import Layer, Variant
from bench.machine import Calibration
from bench.plots import section
from bench.roofline import forward_work, training_work
from bench.shapes import LAYOUTS, PLAIN, Layout, Shape
from bench.verify import WrongResult

SHAPE = Shape("small", 64, 32, 8, 2)
ARGUMENTS = ["--shape", "64,32,8,2", "--tokens", "1", "20", "--rounds", "1", "--threads", "1"]
MACHINE = {
    "cpu": "a CPU", "threads": 2, "date": "2026-01-02", "torch": "2.13.0", "revision": "abc123",
    "peak_flop_per_second": {}, "read_bytes_per_second": {"2": 1e9},
}  # fmt: skip


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(SHAPE, seed=0)


@pytest.fixture(autouse=True)
def _short(monkeypatch, tmp_path, single_thread):
    monkeypatch.setattr(layouts, "_TURN_SECONDS", 0.0)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "machine_record", lambda calibration: MACHINE)
    monkeypatch.setattr(layouts, "Calibration", lambda threads: None)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("variant", [{"rank": 4}, {"full": True}], ids=["lora", "full"])
def test_each_layout_matches_the_reference(layer, name, variant):
    variant = Variant(**variant, layout=name)
    inputs = layer.inputs(40, layout=variant.experts)
    output, grads = moe_sft.call(layer, variant, inputs)
    assert output.shape == variant.experts.output_size(SHAPE, 40)
    assert 0 < moe_sft.check(layer, variant, inputs, (output, grads)) < 0.02
    assert 0 < moe_fwd.check(layer, variant, inputs, moe_fwd.call(layer, variant, inputs)) < 0.02
    assert ("gate_up_bias" in grads) == (variant.full and name == "gpt_oss")


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("plain", "transposed")])
def test_the_result_of_another_layout_is_wrong(layer, name):
    variant = Variant(layout=name)
    inputs = layer.inputs(40, layout=variant.experts)
    output = moe_fwd.call(layer, variant, inputs)
    other = Variant(layout="plain" if name != "clamped" else "gpt_oss")
    with pytest.raises((WrongResult, AssertionError), match=r"output\[0\] is wrong|shape"):
        moe_fwd.check(layer, other, inputs, output)


def test_layouts_share_one_memory(layer):
    for layout in LAYOUTS.values():
        weights = layer.weights(layout)
        for name in ("gate_up_proj", "down_proj"):
            assert weights[name].data_ptr() == getattr(layer, name).data_ptr()
            assert weights[name].stride(1 if layout.transposed else 2) == 1
        assert weights["gate_up_proj"].shape == (8, layout.gate_up_rows(SHAPE), 64)
        assert weights["down_proj"].shape == (8, 64, 32)


def test_work_of_layouts():
    """Without a gate, a third of the weights is missing; without reduce, there are K rows per token."""
    assert PLAIN.options == {}
    thi = 6 * 2 * 64 * 32
    for work, products in ((forward_work, 1), (training_work, 2)):
        plain, no_gate, routes = (
            work(SHAPE, 6, 8, Variant(layout=name)) for name in ("plain", "no_gate", "routes")
        )
        assert (plain.flops, no_gate.flops) == (6 * products * thi, 4 * products * thi)
        assert plain.bytes - no_gate.bytes == 2 * products * 8 * 64 * 32
        assert routes.flops == plain.flops
        assert routes.bytes - plain.bytes == 2 * products * 6 * 64
    with_lora = (forward_work(SHAPE, 6, 8, Variant(3, layout=name)).flops for name in ("plain", "no_gate"))
    lora = [3 * (64 + 64 + 32 + 64), 3 * (64 + 32 + 32 + 64)]
    assert list(with_lora) == [2 * 12 * (3 * 64 * 32 + lora[0]), 2 * 12 * (2 * 64 * 32 + lora[1])]


def test_turns_alternate():
    order: list[str] = []
    clock = {"a": itertools.count(10), "b": itertools.count(20)}

    def call(name: str) -> float:
        order.append(name)
        return next(clock[name])

    pairs = layouts.compare(lambda: call("a"), lambda: call("b"), rounds=4)
    assert "".join(order) == "abbaabba"
    assert pairs == [(10, 20), (11, 21), (12, 22), (13, 23)]


def test_a_turn_is_the_median_of_calls_until_its_time_is_over(monkeypatch):
    monkeypatch.setattr(layouts, "_TURN_SECONDS", 6.0)
    seconds = iter([1.0, 4.0, 2.0, 9.0])
    assert layouts.turn(lambda: next(seconds)) == 2.0
    assert list(seconds) == [9.0]


def test_only_the_call_is_timed(layer):
    ticks = iter([10.0, 12.5])
    call = layouts.timed(layer, "training", 20, "no_gate", lambda: next(ticks))
    assert call() == 2.5
    assert list(ticks) == []


def test_figures_are_those_of_rounds():
    pairs = [(1.0, 2.0), (3.0, 2.0), (8.0, 4.0), (2.0, 8.0), (6.0, 2.0)]
    row = layouts.figures(pairs)
    assert (row["seconds"], row["plain_seconds"]) == (2.0, 3.0)
    assert (row["speed_low"], row["speed"], row["speed_high"]) == (0.5, 1.5, 2.0)


def test_every_layout_is_a_row_of_the_table(capsys, tmp_path):
    assert layouts.main([*ARGUMENTS, "--save"]) == 0
    [file] = tmp_path.iterdir()
    rows = json.loads(file.read_text())["rows"]
    expected = itertools.product(layouts.NAMES, layouts.MODES, (1, 20))
    assert [(row["layout"], row["mode"], row["tokens"]) for row in rows] == list(expected)
    assert all(row["status"] == "ok" and row["speed"] > 0 for row in rows)
    assert set(layouts.NAMES) == set(LAYOUTS) - {"plain"} | {"float16"}
    block = section("layouts", tmp_path)
    assert f"| 64,32,8,2 | gpt_oss | full | {layouts.report.speed(rows[22])} |" in block
    assert f"{ktops.cpu_capability()}: speed relative to the plain layout" in capsys.readouterr().out


def test_float16_is_the_plain_layout_in_that_dtype(monkeypatch):
    made = []

    def timed(layer, mode, tokens, layout, clock):
        made.append((layer.dtype, layout))
        return lambda: 1.0

    monkeypatch.setattr(layouts, "timed", timed)
    assert layouts.main([*ARGUMENTS, "--mode", "full", "--layout", "float16", "clamped"]) == 0
    plain, half = (torch.bfloat16, "plain"), (torch.float16, "plain")
    assert made == 2 * [plain, half, (torch.bfloat16, "clamped")]


def test_a_wrong_layout_has_no_figure(capsys, monkeypatch):
    op = ktops.moe_sft
    monkeypatch.setattr(
        ktops, "moe_sft", lambda *args, **kwargs: op(*args, **kwargs) * (1 + 0.1 * ("gating" in kwargs))
    )
    arguments = [*ARGUMENTS, "--mode", "forward", "--layout", "clamped", "interleaved"]
    assert layouts.main(arguments) == 1
    printed = capsys.readouterr().out
    assert [("WRONG" in line) for line in printed.splitlines() if "forward" in line] == [False, True]


def test_run_measures_layouts_and_dtypes(monkeypatch, tmp_path):
    create = Calibration.__init__
    monkeypatch.setattr(Calibration, "__init__", lambda self, threads: create(self, threads, 1 << 20))
    monkeypatch.setattr("bench.machine._CALL_SECONDS", 0.001)
    monkeypatch.setattr(run, "_plan", lambda args: measure.Plan(1, 0.0, float("inf"), 2))
    monkeypatch.setattr(run.report, "print_machine", lambda machine: None)
    names = ["plain", "gpt_oss", "no_gate"]
    arguments = ["--shape", "64,32,8,2", "--tokens", "20", "--mode", "training", "--layout", *names]
    assert run.main([*arguments, "--dtype", "float16", "--threads", "1", "--save"]) == 0
    [file] = tmp_path.iterdir()
    rows = json.loads(file.read_text())["rows"]
    assert sorted(row["layout"] for row in rows) == sorted(names)
    assert all(row["dtype"] == "float16" and 0 < row["relative_error"] < 0.003 for row in rows)
    assert run.report.mode(rows[0]) == "training float16 gpt_oss"


def test_a_layout_is_a_set_of_arguments():
    layout = Layout(True, True, "interleaved", "swiglu_clamped", (7.0, 1.702, 1.0))
    assert LAYOUTS["gpt_oss"] == layout
    assert layout.options == {
        "gating": "interleaved", "activation": "swiglu_clamped", "activation_args": (7.0, 1.702, 1.0),
    }  # fmt: skip
