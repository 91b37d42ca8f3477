"""The paths of products (ktops_csrc/gemm/path.h): each is taken when forced, and gives the right result."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from massive_channels import MASSIVE, assert_as_good_as_blocks, massive_channels

import ktops
from ktops.testing.compare import check_against_reference, random_grad_output, run
from ktops.testing.inputs import moe_inputs
from ktops.testing.paths import path_names, paths_taken, use_path
from ktops.testing.weights import GROUPED, in_format

ROOT = Path(__file__).parents[2]
FORWARD, BACKWARD = ("gate_up", "down"), ("activate", "combine_x")
ALONG_ROWS, DOWN_ROWS = {"decoded_dots", "row_bands", "dots"}, {"column_sums", "panels_ahead"}
FLOATS = (*sorted(ALONG_ROWS | DOWN_ROWS), "panels")
INTEGERS = ("code_dots", "code_tiles", "code_panels")
WEIGHTS = ("dense", "transposed", "strided", "int4")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def steps(path: str, weights: str) -> tuple[str, ...]:
    """Returns the steps with products that can take a path of floats."""
    if path == "panels":
        return FORWARD + BACKWARD
    return FORWARD if (path in ALONG_ROWS) != (weights == "transposed") else BACKWARD


def inputs_of(weights: str, dtype: torch.dtype) -> dict:
    """Returns inputs with experts that have more than 200 rows, one, and many numbers in between."""
    inputs = moe_inputs(T=300, H=96, I=64, E=24, K=2, dtype=dtype, lora_rank=(2, 3), routing="skewed")
    if weights == "int4":
        return in_format(inputs, "int4", 32)
    for name in ("gate_up_proj", "down_proj"):
        if weights == "transposed":
            inputs[name] = inputs[name].mT.contiguous().mT
        elif weights == "strided":
            inputs[name] = inputs[name].repeat_interleave(2, dim=2)[..., ::2]
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("path", FLOATS)
def test_products_of_floats(isa, path, weights, dtype):
    with use_path(path), ktops.profile() as profile:
        check_against_reference(inputs_of(weights, dtype))
    bands = isa in BAND_ROWS and dtype == torch.bfloat16 and weights != "strided"
    ahead = isa in AHEAD_ROWS and dtype == torch.bfloat16 and weights in ("dense", "int4")
    possible = {"decoded_dots": False, "row_bands": bands, "panels_ahead": ahead}
    for step in steps(path, weights):
        taken = paths_taken(profile, step)
        if path == "decoded_dots" and weights == "int4":
            assert path in taken and len(taken) > 1, "few rows take it, others can't"
        elif not possible.get(path, True):
            assert taken and path not in taken
        else:
            assert taken == {path}


@pytest.mark.parametrize("name,group_size", [("dense", 0), ("int4", 0), ("mxfp8", 32), ("q4_k", 32)])
def test_blocks_packed_ahead(isa, name, group_size):
    """Covers several passes, slabs and blocks, whose last ones are narrower, and an odd number of tiles."""
    inputs = moe_inputs(T=300, H=1792, I=256, E=3, K=2, dtype=torch.bfloat16, lora_rank=3, routing="skewed")
    if name != "dense":
        inputs = in_format(inputs, name, group_size)
    with ktops.profile() as profile:
        check_against_reference(inputs)
    assert isa not in AHEAD_ROWS or "panels_ahead" in paths_taken(profile, *BACKWARD)


def test_bands_in_blocks(isa):
    """Covers blocks of k (kBandBlock), whose last one is shorter, and an odd number of panels."""
    inputs = moe_inputs(T=146, H=608, I=416, E=2, K=1, dtype=torch.bfloat16, lora_rank=3)
    with ktops.profile() as profile:
        check_against_reference(inputs)
    assert isa not in BAND_ROWS or paths_taken(profile, *FORWARD) == {"row_bands"}


@pytest.mark.parametrize("name,group_size", MASSIVE)
@pytest.mark.parametrize("path", INTEGERS)
def test_massive_channels(isa, path, name, group_size):
    with use_path(path), ktops.profile() as profile:
        assert_as_good_as_blocks(*massive_channels(name, group_size, num_tokens=11))
    tiles = isa == "amx_bf16" and name in GROUPED and group_size in (0, 128)
    for step in FORWARD:
        taken = paths_taken(profile, step)
        if path == "code_tiles" and not tiles:
            assert taken and path not in taken
        else:
            assert taken == {path}


def test_every_path_is_tested():
    assert {*FLOATS, *INTEGERS} == set(path_names())


@pytest.mark.parametrize("path", path_names())
def test_a_path_that_is_not_possible_changes_nothing(isa, path):
    """Covers rows that aren't whole tiles, sums of rows only in forward, and codes of dense weights."""
    inputs = moe_inputs(T=9, H=40, I=24, E=2, K=2, dtype=torch.bfloat16, lora_rank=2)
    grad_output = random_grad_output(inputs)
    expected = run(inputs, grad_output)
    with use_path(path):
        forced = run(inputs, grad_output)
    possible = path in ("dots", "column_sums", "panels")
    after = run(inputs, grad_output)
    for name, value in expected.items():
        assert torch.equal(after[name], value), name
        assert possible or torch.equal(forced[name], value), name


DIRECT_ROWS = {
    ("amx_bf16", torch.bfloat16): (12, 12),
    ("avx2", torch.bfloat16): (24, 24),
    ("avx2", torch.float16): (32, 16),
    ("scalar", torch.float16): (2, 3),
}
"""The most rows that dots and column_sums take, unless it is 32 for both."""
FEW_ROWS = {"amx_bf16": 4, "avx512_bf16": 4, "avx512": 4, "avx2": 2, "scalar": 1}
"""The most rows that decoded_dots takes."""
BAND_ROWS = {"amx_bf16": 4, "avx512_bf16": 12}
"""With more rows of bfloat16 than this, row_bands is taken."""
AHEAD_ROWS = {"amx_bf16": (12, 12), "avx512_bf16": (12, 16)}
"""With more rows of bfloat16 than this, panels_ahead is taken for weights that are dense and in a format."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rows_of_an_expert_choose(isa, dtype):
    dots_rows, sums_rows = DIRECT_ROWS.get((isa, dtype), (32, 32))
    band_rows, ahead_rows, decoded_rows = (1000, 1000, 1000)
    if dtype == torch.bfloat16:
        band_rows = BAND_ROWS.get(isa, 1000)
        ahead_rows, decoded_rows = AHEAD_ROWS.get(isa, (1000, 1000))

    def taken(num_rows: int, *steps: str, name: str = "dense", hidden_size: int = 64) -> str:
        inputs = moe_inputs(T=num_rows, H=hidden_size, I=32, E=1, K=1, dtype=dtype)
        if name != "dense":
            inputs = in_format(inputs, name, 0)
        with ktops.profile() as profile:
            compute = "int8" if name == "int8" else "bf16"
            run(inputs, random_grad_output(inputs), ("hidden_states",), compute=compute)
        (path,) = paths_taken(profile, *steps)
        return path

    few = FEW_ROWS[isa]
    thresholds = {few, 4, band_rows, ahead_rows, decoded_rows, dots_rows, sums_rows} - {1000}
    for rows in sorted({1, *thresholds, *(threshold + 1 for threshold in thresholds)}):
        some = "dots" if rows <= dots_rows else "panels"
        many = "row_bands" if rows > band_rows else some
        assert taken(rows, *FORWARD) == many
        assert taken(rows, *FORWARD, name="int4") == ("decoded_dots" if rows <= few else many)
        assert taken(rows, "gate_up", hidden_size=40) == some
        sums = "column_sums" if rows <= sums_rows else "panels"
        assert taken(rows, *BACKWARD) == ("panels_ahead" if rows > ahead_rows else sums)
        assert taken(rows, *BACKWARD, name="int4") == ("panels_ahead" if rows > decoded_rows else sums)
        assert taken(rows, *BACKWARD, hidden_size=40) == sums
    codes = "code_tiles" if isa == "amx_bf16" else "code_panels"
    in_place = 4 if isa == "avx2" else 8
    for rows, path in ((in_place, "code_dots"), (in_place + 1, codes)):
        assert taken(rows, *FORWARD, name="int8") == path


def test_both_sides_of_every_threshold():
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-Wall", "-Wextra", "-fsyntax-only"]
    command += [f"-I{ROOT / 'ktops_csrc'}", str(ROOT / "test" / "path.cpp")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_unknown_path():
    message = f"kt::force_path: name must be one of {','.join(path_names())} or empty, got 'tiles'"
    with pytest.raises(RuntimeError, match=message), use_path("tiles"):
        pass
    assert torch.ops.kt.force_path("") == ""
