"""``bench.scale``'s ranks: what they exchange, the parts that are fitted, its commands, and its page."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.scale import check, model, page, parts, ranks, routing
from bench.scale.__main__ import best, fastest, main
from bench.scale.measured import Measured
from bench.scale.model import Curve
from bench.shapes import Shape
from ktops.testing.torchrun import torchrun

SMALL = Shape("64,32,8,2", 64, 32, 8, 2)
ROOT = Path(__file__).parents[2]


def run_ranks(*arguments: object) -> subprocess.CompletedProcess:
    """Runs a program in two ranks."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(torchrun(2, *arguments), env=environment, cwd=ROOT, capture_output=True, text=True)


EXCHANGE = """
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from bench.scale import parts, routing
from bench.scale.ranks import Identity, Ranks, expert_parallel, run
from test_bench_scale_ranks import SMALL, TOKENS

ranks = Ranks.join()
summed, reduce = [], dist.all_reduce


def counting_reduce(tensor, *arguments, **options):
    summed.append(tensor.nbytes)
    return reduce(tensor, *arguments, **options)


class Counting(Identity):
    received = 0

    def forward(self, hidden_states, topk_ids, topk_weights):
        self.received += hidden_states.shape[0]
        assert topk_ids.min() >= 0 and topk_ids.max() < 4
        return super().forward(hidden_states, topk_ids, topk_weights)


(ids,) = routing.draw(SMALL, TOKENS, 1)
hidden_states, _, topk_weights, grad_output = parts.tokens(SMALL, ids, 0)
mine = [tensor.tensor_split(2)[ranks.rank] for tensor in (hidden_states, ids, topk_weights, grad_output)]
experts = Counting(4)
output, *_ = run(expert_parallel("all_to_all", experts, ranks), "training", tuple(mine), [])
expected = mine[0] * mine[2].float().sum(1, keepdim=True)
torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)

dist.all_reduce = counting_reduce
inputs = hidden_states, ids, topk_weights, grad_output
run(expert_parallel("all_reduce", Identity(4), ranks), "training", inputs, [])
file = Path(sys.argv[1]) / f"{ranks.rank}.json"
file.write_text(json.dumps({"received": experts.received, "summed": summed}))
dist.barrier()
os._exit(0)  # threads of gloo that still free the last exchange can abort a process that ends otherwise
"""
TOKENS = 13


def test_what_ranks_exchange(tmp_path):
    """transformers' expert parallelism really run between two processes, its rows and bytes counted."""
    script = tmp_path / "exchange.py"
    script.write_text(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n{EXCHANGE}")
    done = run_ranks(str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    counted = routing.counts(routing.draw(SMALL, TOKENS, 1), 8, 2)
    received = routing.traffic(counted)[0].sum(0).tolist()
    assert [each["received"] for each in found] == received

    predicted: list[float] = []

    class Recording:
        def all_reduce(self, nbytes: float, size: int) -> float:
            predicted.append(nbytes)
            return 0.0

    around = {"all_reduce training": Curve({1: 1.0})}
    engine = model.Engine(
        1.0,
        {"training": Curve({1: 1.0})},
        {"training": 1.0},
        {"training": 0.0},
        0.0,
        {"training": 1.0},
        around,
    )
    model.all_reduce(engine, Recording(), SMALL, "training", TOKENS, counted)
    for each in found:
        assert sorted(each["summed"]) == sorted(predicted)


@pytest.mark.parametrize(
    ("nodes", "number", "expected"),
    [
        ([[0, 1]], 2, [[0], [1]]),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([[0, 1], [4, 5]], 1, [[0, 1, 4, 5]]),
        ([[0, 2, 4], [1, 3, 5]], 4, [[0], [2, 4], [1], [3, 5]]),
    ],
)
def test_cpus_of_ranks(nodes, number, expected):
    assert ranks.divide(nodes, number) == expected


def test_more_ranks_than_cpus():
    with pytest.raises(ValueError, match="ranks must be at most the number of CPUs, 2; got 3"):
        ranks.divide([[0, 1]], 3)


def test_more_nodes_than_there_are():
    with pytest.raises(ValueError, match="nodes must be at most 2, the nodes of this host; got 3"):
        ranks.divide([[0], [1]], 2, 3)
    assert ranks.divide([[0, 1], [2, 3]], 2, 1) == [[0], [1]]


def test_experts_that_cannot_be_divided(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--shape", SMALL.name, "--ranks", "3"])
    assert "--ranks must divide the 8 experts, got 3" in capsys.readouterr().err


def test_nodes_of_this_host():
    assert sorted(cpu for node in ranks.node_cpus() for cpu in node) == sorted(os.sched_getaffinity(0))


def made_rows(engine: model.Engine, threads: int) -> list[dict]:
    """The rows that measuring an engine without noise would give."""
    rows: list[dict] = []

    def add(kind: str, name: str, size: int, experts: int, seconds: float) -> None:
        rows.append({"kind": kind, "name": name, "threads": threads, "size": size, "experts": experts,
                     "seconds": seconds, "shape": SMALL.name})  # fmt: skip

    for mode in parts.MODES:
        flops, moved, adapters = model.expert_work(SMALL, mode)
        fixed = engine.call[mode] + 8 * adapters * engine.fill

        def each(size: int, mode: str = mode, flops: int = flops, moved: int = moved) -> float:
            compute = engine.rows_at_peak[mode](torch.tensor(size)) * flops / engine.peak
            return model.together(compute, moved / engine.bandwidth[mode], engine.overlap[mode]).item()

        add("call", mode, 1, 1, engine.call[mode])
        add("single", mode, 1, 1, fixed + each(1))
        for size in parts.ROWS:
            compute = engine.rows_at_peak[mode].at(size) * flops / engine.peak
            add("hot", mode, size, 1, engine.call[mode] + compute)
        for size in parts.COLD_ROWS:
            add("cold", mode, size, 4, fixed + 4 * each(size))
        for name in parts.COLLECTIVES:
            for size in (1, 2048):
                add("around", f"{name} {mode}", size, 0, size * 1e-6)
    return rows


def test_parts_are_found_again():
    """An engine whose rows are computed by its own formulas is found from those rows."""
    made = model.Engine(
        peak=3e9,
        rows_at_peak={mode: Curve({1: 2.0, 64: 80.0, 1024: 1100.0}) for mode in parts.MODES},
        bandwidth={"forward": 1e7, "training": 2e7},  # one row takes far longer to read than to compute
        call={"forward": 1e-5, "training": 2e-4},
        fill=1e-9,
        overlap={"forward": 2.5, "training": 6.0},
        around={},
    )
    machine = {"peak_flop_per_second": {"avx2 bfloat16": {"1": 3e9}}, "read_bytes_per_second": {"1": 4e7}}
    found = Measured(SMALL, made_rows(made, 1), machine, "avx2").engine(1)
    assert found.peak == made.peak and found.call == made.call
    assert found.fill == pytest.approx(made.fill, rel=1e-3)
    assert found.overlap == made.overlap
    for mode in parts.MODES:
        assert found.bandwidth[mode] == pytest.approx(made.bandwidth[mode], rel=1e-3)
        for size in (1, 3, 64, 500, 5000):
            assert found.rows_at_peak[mode].at(size) == pytest.approx(
                made.rows_at_peak[mode].at(size), rel=0.02
            )
    assert found.surround("all_to_all", SMALL, "training", 2048) == pytest.approx(2048e-6)


def test_the_fastest_of_several_passes():
    row = {"kind": "hot", "name": "forward", "threads": 1, "size": 1, "shape": "s"}
    slow, fast, other = row | {"seconds": 2.0}, row | {"seconds": 1.0}, row | {"size": 2, "seconds": 3.0}
    assert fastest([[slow, other], [fast]]) == [fast, other]


def test_the_highest_limits():
    def machine(peak: float, read: float) -> dict:
        return {
            "cpu": "c",
            "peak_flop_per_second": {"avx2 bfloat16": {"1": peak}},
            "read_bytes_per_second": {"1": read},
        }

    assert best([machine(2.0, 3.0), machine(1.0, 4.0)]) == machine(2.0, 4.0)


def test_check_runs():
    """All four cases run, their results agree, and each has a prediction. Status 1: some are far off."""
    sizes = ["--shape", SMALL.name, "--tokens", "1", "5", "--rounds", "1", "--seconds", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.scale", "check", *sizes], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    for words in (
        "1 process, 1 thread",
        "all_reduce",
        "all_to_all",
        "Peak of a core",
        "by gloo between 2 processes",
    ):
        assert words in done.stdout, done.stdout + done.stderr
    assert "nan" not in done.stdout, done.stdout
    differences = [abs(float(ratio) - 1) for ratio in re.findall(r"\((\d+\.\d\d)\)", done.stdout)]
    assert len(differences) == 16, done.stdout
    largest = max(differences)
    assert done.returncode == (largest > check.LIMIT) or abs(largest - check.LIMIT) < 0.01  # rounded


def test_the_page_is_current():
    text = page.PAGE.read_text()
    block = text.split(f"<!-- begin {page.BLOCK} -->\n")[1].split(f"<!-- end {page.BLOCK} -->")[0]
    assert block.strip() == page.block().strip()
