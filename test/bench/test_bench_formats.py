"""``bench.formats``: a small run, its rooflines, and the tables generated from its results."""

import json

import pytest

import ktops
from bench import formats, results
from bench.layer import Layer
from bench.plots import fill
from bench.roofline import Limits
from bench.shapes import Shape

TINY = Shape("tiny", 256, 256, 8, 2)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(TINY, 0)


def test_a_small_run(capsys, monkeypatch):
    """The table has all columns and the type each contestant computes in; all kernels have the same lines."""
    monkeypatch.setattr(formats, "Calibration", FixedCalibration)
    monkeypatch.setattr(results, "machine_record", lambda calibration: MACHINE)
    monkeypatch.setattr(formats.report, "print_machine", lambda machine: None)
    options = ["--shape", "256,256,8,2", "--tokens", "1", "40", "--rounds", "1", "--isa", "scalar"]
    assert formats.main([*options, "--formats", "int4:32", "int8@int8", "q4_k"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("forward") for line in lines) == 2 * 4
    assert sum(line.startswith("training") for line in lines) == 2 * 3
    assert not any("WRONG" in line for line in lines)


MACHINE = {"cpu": "a CPU", "threads": 1, "read_bytes_per_second": {"1": 1e9}}


class FixedCalibration:
    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads

    def peak(self, isa: str, dtype: str) -> float:
        return {"bfloat16": 1e9, "int8": 4e9}[dtype]

    def bandwidth(self) -> float:
        return 1e9


def test_a_wrong_result_is_found(layer, monkeypatch):
    entrant = formats.contestant("int4:32", layer)
    assert formats.check(entrant, layer) < formats.allowed(entrant)
    run = ktops.moe_sft
    monkeypatch.setattr(
        ktops, "moe_sft", lambda *args, compute: run(*args, compute=compute) * (1 + (compute == "int8"))
    )
    entrant = formats.contestant("int4:32@int8", layer)
    assert formats.check(entrant, layer) > formats.allowed(entrant)


@pytest.mark.parametrize(
    ("text", "bits"), [("int4:32", 4.5), ("int8", 8.125), ("q4_k", 4.5), ("mxfp8", 8.25)]
)
def test_bytes_are_those_of_the_format(layer, text, bits):
    entrant = formats.contestant(text, layer)
    assert entrant.bytes_an_expert == TINY.expert_elements * bits / 8
    work = formats.work(TINY, entrant, 1, 2, training=False)
    assert work.bytes == 2 * entrant.bytes_an_expert + 2 * 2 * 256
    assert formats.work(TINY, entrant, 1, 2, training=True).flops == 2 * work.flops
    assert work.bound(Limits(1e12, 1e9)) == "memory"


def test_unknown_format(layer):
    with pytest.raises(ValueError, match=r"format must be one of .*, got 'int3'"):
        formats.contestant("int3", layer)


def test_machines_have_tables_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    row = {
        "shape": "tiny", "mode": "forward", "tokens": 1, "format": "int8", "speed": 2, "isa": "avx512_bf16",
    }  # fmt: skip
    for cpu, fraction in (("One CPU", 0.25), ("Other CPU", 0.75)):
        machine = {**MACHINE, "cpu": cpu, "revision": "abc"}
        results.save("formats", machine, "avx512_bf16", [{**row, "fraction": fraction}], formats.row_key)
    first, second = formats.section("avx512_bf16").split("Other CPU")
    assert first.startswith("One CPU, 1 threads, avx512_bf16 kernels, revision abc; 1.0 GB/s.\n\n| format |")
    assert "| int8 | 0.25 (2.00) |" in first and "| int8 | 0.75 (2.00) |" in second
    assert formats.section("avx512") == ""


def test_page_holds_the_saved_results():
    page = formats.PAGE.read_text()
    rows = {json.loads(file.read_text())["isa"] for file in results.RESULTS.glob("formats-*.json")}
    for isa in rows:
        assert fill(page, f"speed {isa}", formats.section(isa)) == page
    assert rows == {isa for isa in ktops.cpu_capabilities() if f" {isa} kernels, revision" in page}
