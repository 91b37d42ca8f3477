"""``python -m bench.run`` end to end on a tiny layer, and its handling of wrong results."""

import json
import re
import subprocess
import sys
import threading
import time

import pytest
import torch

import ktops
from bench import machine, measure, moe_sft, report, results, run
from bench.layer import Layer, Variant
from bench.machine import Calibration, OtherLoad, run_on_threads
from bench.shapes import Shape
from bench.verify import WrongResult

ARGUMENTS = ["--quick", "--shape", "64,32,8,2", "--tokens", "1", "40", "--rounds", "1", "--max-load", "inf"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Uses short samples and a small buffer, because the figures mean nothing here."""
    create = Calibration.__init__
    monkeypatch.setattr(Calibration, "__init__", lambda self, threads: create(self, threads, 1 << 20))
    monkeypatch.setattr(machine, "_CALL_SECONDS", 0.001)
    plan = run._plan
    monkeypatch.setattr(run, "_plan", lambda args: measure.Plan(plan(args).rounds, 0.0, args.max_load, 2))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_bench(tmp_path, *arguments) -> tuple[int, dict, list[dict]]:
    """Returns (exit status, machine record, rows)."""
    file = tmp_path / "rows.jsonl"
    status = run.main([*ARGUMENTS, "--json", str(file), *arguments])
    limits, *rows = [json.loads(line) for line in file.read_text().splitlines()]
    return status, limits, rows


def test_reports_every_configuration(tmp_path, capsys):
    status, limits, rows = run_bench(tmp_path, "--threads", "2", "--plot", str(tmp_path / "rows.png"))
    assert status == 0
    assert [(r["tokens"], r["mode"], r["lora_rank"]) for r in rows] == [
        (1, "forward", 0), (1, "training", 16), (40, "forward", 0), (40, "training", 16),
    ]  # fmt: skip
    for row in rows:
        assert row["status"] == "ok"
        assert row["samples"] == 1
        assert row["limit_seconds"] > 0
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert 0 < row["relative_error"] < 0.02
    available = {name for name, ok in ktops.cpu_capabilities().items() if ok}
    assert {key.split()[0] for key in limits["peak_flop_per_second"]} == available
    from_l2 = limits["l2_flop_per_second"]
    assert from_l2.keys() == limits["peak_flop_per_second"].keys()
    assert all(rate > 0 for rates in from_l2.values() for rate in rates.values())
    assert set(limits["read_bytes_per_second"]) == {"1", "2"}
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "fraction" in printed
    scalar = from_l2["scalar bfloat16"]["2"]
    assert re.search(rf"peak scalar bfloat16: .* on 2 \({scalar / 1e9:.1f} from L2\)", printed)
    assert "WRONG" not in printed


def _drop_a_route(moe_sft):
    def broken(x, ids, weights, *args, **kwargs):
        return moe_sft(
            x, torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], -1)], 1), weights, *args, **kwargs
        )

    return broken


def _scale_the_output(moe_sft):
    return lambda *args, **kwargs: moe_sft(*args, **kwargs) * 1.05


def _return_nan(moe_sft):
    return lambda *args, **kwargs: moe_sft(*args, **kwargs) * float("nan")


@pytest.mark.parametrize("breakage", [_drop_a_route, _scale_the_output, _return_nan])
def test_refuses_a_wrong_output(tmp_path, capsys, monkeypatch, breakage):
    monkeypatch.setattr(ktops, "moe_sft", breakage(ktops.moe_sft))
    status, _, rows = run_bench(tmp_path)
    assert status == 1
    for row in rows:
        assert row["status"] == "wrong"
        assert "output" in row["message"]
        assert not {"seconds", "fraction", "flop_per_second"} & set(row)
    assert capsys.readouterr().out.count("WRONG") == len(rows)


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.1


@pytest.mark.parametrize("argument", ["gate_up_lora_A", "gate_up_lora_B", "down_lora_A", "down_lora_B"])
def test_refuses_a_wrong_adapter_gradient(tmp_path, monkeypatch, argument):
    moe_sft = ktops.moe_sft

    def broken(*args, **kwargs):
        if argument in kwargs and torch.is_grad_enabled():
            kwargs[argument] = _BadGradient.apply(kwargs[argument])
        return moe_sft(*args, **kwargs)

    monkeypatch.setattr(ktops, "moe_sft", broken)
    status, _, rows = run_bench(tmp_path)
    assert status == 1
    assert {row["mode"]: row["status"] for row in rows} == {"forward": "ok", "training": "wrong"}
    assert all(argument in row["message"] for row in rows if row["mode"] == "training")


@pytest.mark.parametrize("position", [0, 2])
def test_refuses_a_wrong_token_gradient(tmp_path, monkeypatch, position):
    moe_sft = ktops.moe_sft

    def broken(*args, **kwargs):
        args = [_BadGradient.apply(a) if i == position and a.requires_grad else a for i, a in enumerate(args)]
        return moe_sft(*args, **kwargs)

    monkeypatch.setattr(ktops, "moe_sft", broken)
    status, _, rows = run_bench(tmp_path, "--mode", "training")
    assert status == 1
    assert [row["status"] for row in rows] == ["wrong", "wrong"]


def test_drops_samples_while_others_compute(tmp_path, capsys):
    status, _, rows = run_bench(tmp_path, "--max-load", "-1", "--tokens", "1")
    assert status == 3
    assert [(row["status"], row["samples"], row["dropped_samples"]) for row in rows] == [("busy", 0, 2)] * 2
    assert "4 dropped" in capsys.readouterr().out


def test_other_load_sees_another_process():
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with OtherLoad() as load:
            before = machine._busy_seconds()
            while machine._busy_seconds() < before + 0.2:
                time.sleep(0.02)
        other.kill()
    assert load.cores > 0


def test_other_load_leaves_out_this_process(monkeypatch):
    busy, own, wall = iter([10.0, 13.0]), iter([1.0, 3.0]), iter([100.0, 102.0])
    monkeypatch.setattr(machine, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(machine.time, "process_time", lambda: next(own))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(wall))
    with OtherLoad() as load:
        pass
    monkeypatch.undo()
    assert load.cores == 0.5


def test_unknown_isa_is_an_error(capsys):
    with pytest.raises(SystemExit) as error:
        run.main([*ARGUMENTS, "--isa", "sparc"])
    assert error.value.code == 2
    assert "--isa: sparc cannot run here" in capsys.readouterr().err


def test_threads_overlap():
    """Both calls must be inside the function at once, or the inner barrier times out."""
    meeting = threading.Barrier(2)
    assert run_on_threads(2, lambda index: (meeting.wait(timeout=30) >= 0, index)) == [(True, 0), (True, 1)]


def test_measure_peak_releases_the_interpreter_lock():
    """Nothing else lets another thread run, because the switch interval is long."""
    interval, turn, go = sys.getswitchinterval(), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (go.wait(), turn.set()))
    thread.start()
    isa, calls = ktops.cpu_capability(), 0
    sys.setswitchinterval(1000)
    try:
        go.set()
        while not turn.is_set() and calls < 20_000:
            torch.ops.kt.measure_peak(isa, "float32", 1 << 16)
            calls += 1
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert calls < 20_000


def test_few_routes_come_back_late():
    layer = Layer(Shape("deck", 8, 8, 12, 3), seed=0)
    dealt = torch.cat([layer.inputs(2).topk_ids.flatten() for _ in range(2)])
    assert dealt.unique().numel() == 12
    assert layer.inputs(100).distinct_experts == 12


def test_half_of_the_tokens_choose_one_expert():
    ids = Layer(Shape("skewed", 8, 8, 12, 3), seed=0).inputs(100, "skewed").topk_ids
    assert (ids == 0).any(dim=1).sum() == 50
    assert all(row.unique().numel() == 3 for row in ids)


def test_variants_are_rows_of_their_own(tmp_path):
    _, _, rows = run_bench(
        tmp_path, "--mode", "training", "--tokens", "40", "--rank", "0", "8",
        "--full", "--recompute", "--dtype", "float32", "--routing", "skewed",
    )  # fmt: skip
    assert [(r["status"], r["lora_rank"], r["full"], r["save"], r["dtype"], r["routing"]) for r in rows] == [
        ("ok", 0, True, "recompute", "float32", "skewed"), ("ok", 8, True, "recompute", "float32", "skewed"),
    ]  # fmt: skip
    assert all(row["relative_error"] < 1e-5 for row in rows)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_refuses_a_wrong_weight_gradient(name):
    layer, variant = Layer(Shape("small", 64, 32, 8, 2), seed=0), Variant(rank=4, full=True)
    inputs = layer.inputs(40)
    output, grads = moe_sft.call(layer, variant, inputs)
    assert 0 < moe_sft.check(layer, variant, inputs, (output, grads)) < 0.02
    grads[name] = grads[name] * 1.05
    with pytest.raises(WrongResult, match=name):
        moe_sft.check(layer, variant, inputs, (output, grads))


def test_a_layer_comes_back_from_its_file(tmp_path):
    layer = Layer(Shape("small", 64, 32, 8, 2), seed=0)
    layer.write(tmp_path / "layer.pt", rank=4)
    for copy in (False, True):
        back = Layer.read(tmp_path / "layer.pt", copy=copy)
        assert back.shape == layer.shape
        assert torch.equal(back.gate_up_proj, layer.gate_up_proj)
        assert torch.equal(back.down_proj, layer.down_proj)
        assert back.adapters(4).keys() == layer.adapters(4).keys()
        assert all(torch.equal(back.adapters(4)[k], v) for k, v in layer.adapters(4).items())


def test_slow_configurations_have_one_round(monkeypatch):
    plan = measure.Plan(3, 0.0, float("inf"), 3, slow_seconds=0.0)
    row = measure.Configuration(
        moe_sft, ktops.cpu_capability(), Layer(Shape("s", 64, 32, 8, 2), 0), 4, Variant(4)
    )
    measure.measure([row], Calibration(1), plan)
    assert row.samples == 1


def test_undisturbed_calls_are_those_with_fast_caches(capsys):
    row = measure.Configuration(moe_sft, "avx2", Layer(Shape("s", 64, 32, 8, 2), 0), 4, Variant(4))
    row.fractions, row.cache_reads, row.fastest_cache_read = [0.5, 0.9, 0.8], [1e9, 2.1e9, 1.9e9], 2.2e9
    row.seconds = row.limit_seconds = row.flop_rates = [1.0] * 3
    row.bounds = ["compute"] * 3
    record = row.record()
    assert record["fraction"] == 0.8
    assert (record["undisturbed_fraction"], record["undisturbed_calls"]) == (pytest.approx(0.85), 2)
    row.fastest_cache_read = 4e9
    assert (row.record()["undisturbed_fraction"], row.record()["undisturbed_calls"]) == (None, 0)
    report.print_table([record, row.record()])
    assert "0.850 (2)" in capsys.readouterr().out


def test_the_fastest_cache_read_is_kept():
    calibration = Calibration(2)
    rates = [calibration.cache_read() for _ in range(5)]
    assert calibration.fastest_cache_read == max(rates) > 0


def test_saved_rows_join_those_of_other_configurations(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    isa = ktops.cpu_capability()
    arguments = [*ARGUMENTS, "--save", "--isa", isa, "--mode", "forward"]
    assert run.main(arguments) == 0
    [record] = results.load("run", tmp_path)
    assert [row["tokens"] for row in record["rows"]] == [1, 40]
    assert record["isa"] == isa
    assert {"cpu", "features", "torch", "revision", "peak_flop_per_second"} <= set(record["machine"])
    kept = record["rows"][0]
    assert run.main([*arguments, "--tokens", "40", "64"]) == 0
    [record] = results.load("run", tmp_path)
    assert [row["tokens"] for row in record["rows"]] == [1, 40, 64]
    assert record["rows"][0] == kept
    assert list(tmp_path.iterdir()) == [results.result_file("run", record["machine"], isa)]


def test_isa_all_is_every_row_of_this_machine():
    have = [name for name, available in ktops.cpu_capabilities().items() if available]
    assert run.parse_arguments(["--isa", "all"]).isa == have
