"""``python -m bench.instruction_mix``: enough dot products per tile load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ktops
from bench import instruction_mix
from bench.layer import Layer
from bench.shapes import parse_shape

SHAPE = "320,256,3,2"


@pytest.mark.parametrize("rows", [32, 40])
def test_every_expert_has_so_many_rows(rows):
    inputs = instruction_mix.balanced_inputs(Layer(parse_shape(SHAPE), seed=0), rows)
    assert torch.bincount(inputs.topk_ids.flatten()).tolist() == [rows] * 3
    assert all(len(set(ids)) == 2 for ids in inputs.topk_ids.tolist())


def test_rows_that_cannot_be_dealt():
    with pytest.raises(ValueError, match="multiple of top_k=2"):
        instruction_mix.balanced_inputs(Layer(parse_shape(SHAPE), seed=0), 33)


if ktops.cpu_capabilities()["avx512_bf16"]:

    @pytest.fixture(scope="module")
    def measured(tmp_path_factory):
        """({(mode, rows, rank): row} of one run, its output)"""
        file = tmp_path_factory.mktemp("mix") / "mix.jsonl"
        root = str(Path(__file__).parents[2])
        arguments = ["--shape", SHAPE, "--rows", "32", "48", "64", "--rank", "0", "16", "--threads", "2"]
        command = [sys.executable, "-m", "bench.instruction_mix", *arguments, "--json", str(file)]
        env = os.environ | {"PYTHONPATH": f"{Path(ktops.__file__).parents[1]}:{root}"}
        result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return {(r["mode"], r["rows_per_expert"], r["lora_rank"]): r for r in rows}, result.stdout

    def test_one_load_serves_a_dot_product(measured):
        """Covers the large products: experts with 32 rows and more, no adapters.

        The six products of 32 rows of a weight with 3 panels take seven loads.
        """
        rows, _ = measured
        for (mode, n, rank), row in rows.items():
            assert row["instructions"]["tdpbf16ps"] > 0
            if rank == 0:
                assert row["dot_products_per_load"] >= 6 / 7, (mode, n, row)

    def test_all_the_work_is_done_with_tiles(measured):
        """A dot product has 16 x 16 x 32 multiply-adds; the sizes of this shape are multiples of a tile."""
        rows, _ = measured
        shape = parse_shape(SHAPE)
        for n in (32, 48, 64):
            products = shape.num_experts * n * shape.expert_elements // (16 * 16 * 32)
            assert rows["forward", n, 0]["instructions"]["tdpbf16ps"] == products
            assert rows["forward+backward", n, 0]["instructions"]["tdpbf16ps"] == 2 * products

    def test_table(measured):
        rows, printed = measured
        lines = printed.splitlines()
        assert len(lines) == 1 + len(rows) and lines[0].split()[0] == "shape"
        assert all(SHAPE in line for line in lines[1:])

else:

    def test_without_avx512_bf16_it_says_so():
        with pytest.raises(RuntimeError, match="AVX-512 with BF16"):
            instruction_mix.main(["--shape", SHAPE])
