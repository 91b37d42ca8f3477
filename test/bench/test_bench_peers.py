"""``python -m bench.peers``: which contestants take part, their order, and the handling of wrong results."""

import functools
import math
import subprocess
import sys

import pytest
import torch
from inside import Inside

import ktops
from bench import contest, moe_fwd, results
from bench.contest import ContestError, Entrant, Turns, Worker, inputs_around
from bench.layer import Layer, Variant
from bench.machine import Calibration
from bench.peers import CONTESTANTS, PARITY
from bench.peers import __main__ as peers
from bench.shapes import Shape

ARGUMENTS = ["--shape", "64,32,8,2", "--tokens", "1", "40", "--rounds", "1", "--max-load", "inf", "--quick"]
ALWAYS = {
    "forward": ["ktops", "transformers eager", "transformers grouped_mm"],
    "training": ["ktops", "LoRA loop", "LoRA grouped_mm", "PEFT"],
}


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    """Avoids subprocesses, shortens samples, and saves results in the test's folder."""
    create = Calibration.__init__
    monkeypatch.setattr(Calibration, "__init__", lambda self, threads: create(self, threads, 1 << 20))
    monkeypatch.setattr("bench.machine._CALL_SECONDS", 0.001)
    monkeypatch.setattr(contest, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(peers, "Worker", Inside)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(Inside, "made", [])
    monkeypatch.setattr(Inside, "asked", [])
    monkeypatch.setattr(Inside, "spoil", None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def saved_rows(*arguments) -> tuple[int, list[dict]]:
    """Returns (exit status, rows)."""
    status = peers.main([*ARGUMENTS, "--save", *arguments])
    [record] = results.load("peers", results.RESULTS)
    return status, record["rows"]


def test_every_contestant_that_needs_torch_alone_agrees_with_the_reference(capsys):
    status, rows = saved_rows()
    assert status == 0
    for mode, names in ALWAYS.items():
        for tokens in (1, 40):
            case = [row for row in rows if row["mode"] == mode and row["tokens"] == tokens]
            assert {row["contestant"] for row in case} == set(names)
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < row["relative_error"] < 0.03
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["fraction"] == pytest.approx(row["limit_seconds"] / row["seconds"], rel=1e-4)
    output = capsys.readouterr()
    for name in ("kt-kernel", "sglang", "zentorch"):
        assert f"{name}: left out, no environment" in output.err
    assert "best peer / ktops" in output.out


class _Spoiled:
    def __init__(self, contestant, change) -> None:
        self.contestant, self.change = contestant, change

    def forward(self, inputs):
        return self.change("output", self.contestant.forward(inputs))

    def training(self, inputs):
        output, grads = self.contestant.training(inputs)
        grads = {name: self.change(name, grad) for name, grad in grads.items()}
        return self.change("output", output), grads


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("transformers eager", "output"),
        ("ktops", "output"),
        ("LoRA loop", "down_lora_B"),
        ("PEFT", "gate_up_lora_A"),
        ("LoRA grouped_mm", "hidden_states"),
    ],
)
def test_a_wrong_contestant_has_no_figure(capsys, monkeypatch, name, tensor):
    def spoil(contestant_name, contestant):
        if contestant_name != name:
            return contestant
        return _Spoiled(contestant, lambda key, t: t * 1.1 if key == tensor else t)

    monkeypatch.setattr(Inside, "spoil", staticmethod(spoil))
    mode = "training" if name in ALWAYS["training"][1:] else "forward"
    status, rows = saved_rows("--mode", mode, "--tokens", "40")
    assert status == 1
    assert {row["contestant"]: row["status"] for row in rows} == {
        entry: "wrong" if entry == name else "ok" for entry in ALWAYS[mode]
    }
    [wrong] = [row for row in rows if row["status"] == "wrong"]
    assert tensor in wrong["message"] and "seconds" not in wrong
    printed = capsys.readouterr()
    assert f"WRONG {name}" in printed.err and "WRONG" in printed.out


def test_everybody_has_turns_on_the_same_inputs_in_alternating_order(monkeypatch):
    monkeypatch.setattr(peers, "Turns", functools.partial(Turns, slow_factor=math.inf))
    peers.main([*ARGUMENTS, "--mode", "forward", "--tokens", "40", "--rounds", "3", "--isa", "scalar"])
    runs = [request["contestant"] for request in Inside.asked if request["do"] == "run"]
    timed = runs[2 * len(ALWAYS["forward"]) :]
    assert timed == ALWAYS["forward"] + ALWAYS["forward"][::-1] + ALWAYS["forward"]
    assert len({request["file"] for request in Inside.asked if request["do"] == "inputs"}) == 1


def test_peers_are_kept_to_the_instructions_of_the_row(capsys):
    peers.main([*ARGUMENTS, "--mode", "forward", "--tokens", "1", "--isa", "scalar"])
    ours, torch_peers = (worker.environment for worker in Inside.made)
    assert ours["KTOPS_ISA"] == "scalar" and "ONEDNN_MAX_CPU_ISA" not in ours
    assert torch_peers["ONEDNN_MAX_CPU_ISA"] == "SSE41" and "KTOPS_ISA" not in torch_peers
    assert "ONEDNN_MAX_CPU_ISA=SSE41" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ranking", "row", "left"),
    [
        (["amx_bf16", "avx512", "avx512_bf16", "avx2"], "avx512", "avx512_bf16"),
        (["amx_bf16", "avx512_bf16", "avx512", "avx2"], "avx512", "avx512"),
        (["amx_bf16", "avx512", "avx512_bf16", "avx2"], "amx_bf16", "amx_bf16"),
        (["amx_bf16", "avx512", "avx512_bf16", "avx2"], "avx2", "avx2"),
    ],
)
def test_peers_keep_what_is_left_without_the_rows_above(monkeypatch, ranking, row, left):
    monkeypatch.setattr(ktops, "cpu_capabilities", lambda: dict.fromkeys(ranking, True))
    assert peers.parity(row) == PARITY[left]


def test_peers_do_not_get_what_the_cpu_lacks(monkeypatch):
    rows = {"amx_bf16": False, "avx512": True, "avx512_bf16": False, "avx2": True}
    monkeypatch.setattr(ktops, "cpu_capabilities", lambda: rows)
    assert peers.parity("avx512") == PARITY["avx512"]


def test_a_worker_and_its_torch_peers_do_not_need_ktops():
    modules = [f"bench.peers.{entry.module}" for entry in CONTESTANTS if entry.home == "torch"]
    code = f"import sys; sys.modules['ktops'] = None; import bench.worker, {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], cwd=results.ROOT, check=True)


def test_an_environment_without_the_peer_is_left_out_with_a_word(capsys):
    status, rows = saved_rows("--mode", "forward", "--tokens", "1", "--peer", f"zentorch={sys.executable}")
    assert status == 0
    assert "zentorch" not in {row["contestant"] for row in rows}
    assert "zentorch: left out, ModuleNotFoundError" in capsys.readouterr().err


def test_only_takes_some(capsys):
    _, rows = saved_rows("--only", "LoRA loop", "--tokens", "1")
    assert {row["contestant"] for row in rows} == {"ktops", "LoRA loop"}


def test_a_slow_contestant_has_one_round(tmp_path):
    calls = []

    class Paced:
        def ask(self, do, **arguments):
            if do == "run":
                calls.append(arguments["contestant"])
                pace = 20.0 if arguments["contestant"] == "slow" else 1.0
                return {"seconds": [pace], "cpu_seconds": 0.0, "last": 0}
            if do == "result":
                torch.save(torch.ones(1), arguments["file"])
            return {}

    layer, worker = Layer(Shape("s", 64, 32, 8, 2), 0), Paced()
    entrants = [Entrant("fast", worker), Entrant("slow", worker)]
    turns = Turns(3, 0.0, float("inf"), 9)
    contest.contest(entrants, "forward", inputs_around(layer, 4), lambda *_: 0.0, turns, tmp_path)
    assert [len(entrant.samples) for entrant in entrants] == [3, 1]
    assert calls.count("slow") == 2 and calls.count("fast") == 5


def test_inputs_go_around_all_experts():
    layer = Layer(Shape("deck", 8, 8, 12, 3), seed=0)
    ids = torch.cat([inputs.topk_ids.flatten() for inputs in inputs_around(layer, 1)])
    assert ids.tolist() != ids.sort().values.tolist() and ids.unique().numel() == 12


def test_a_worker_process_answers_and_its_end_is_noticed(tmp_path):
    layer = Layer(Shape("s", 64, 32, 8, 2), 0)
    layer.write(tmp_path / "layer.pt", rank=4)
    [entry] = [entry for entry in CONTESTANTS if entry.name == "ktops"]
    worker = Worker(sys.executable, {"KTOPS_ISA": "scalar"}, tmp_path / "log")
    modules = {"ktops": {"module": entry.module, "options": entry.options}}
    reply = worker.ask("load", file=str(tmp_path / "layer.pt"), rank=4, threads=1, contestants=modules)
    assert reply == {"unavailable": {"ktops": None}, "torch": torch.__version__}
    entrant = Entrant("ktops", worker)
    calls = inputs_around(layer, 8)

    def check(entrant, inputs, result):
        with ktops.use_isa("scalar"):
            expected = moe_fwd.call(layer, Variant(), inputs)
        assert torch.equal(result, expected)
        return 0.0

    turns = Turns(2, 0.0, float("inf"), 4)
    contest.contest([entrant], "forward", calls, check, turns, tmp_path)
    assert entrant.status == "ok" and len(entrant.samples) == 2 and entrant.error == 0.0
    with pytest.raises(ContestError, match="no_such_mode"):
        worker.ask("run", contestant="ktops", mode="no_such_mode", seconds=0.0, max_calls=1)
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(ContestError, match="ended with status -9"):
        worker.ask("inputs", file="")
    worker.close()
