"""A new format takes one C++ file, its lines in formats.def and one Python class; everything else follows."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ktops
from ktops.formats import Codes, Format, get_format, register, registry
from ktops.formats.format import in_groups, spread
from ktops.testing.budgets import SAFETY, rms, rounding_level

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "ktops_csrc"
LINE = "KT_FORMAT(toy, Toy, kUInt8, 1, 1, kFloats, false, 0)\n"


class Toy(Format):
    """Stores a byte q per weight (q - 100) * scale."""

    name, dtype, has_scale, group_sizes = "toy", torch.uint8, True, (0, -1)

    def row_elements(self, columns: int) -> int:
        return columns

    def quantize_reference(self, weight: Tensor, group_size: int, method: str) -> Codes:
        groups = in_groups(weight, group_size)
        scale = groups.abs().amax(-1, keepdim=True) / 100
        codes = (groups / scale + 100).round().to(torch.uint8).flatten(-2)
        return Codes(codes[..., : weight.shape[-1]].contiguous(), scale.squeeze(-1))

    def dequantize(self, codes: Codes, columns: int, group_size: int) -> Tensor:
        return (codes.weight.float() - 100) * spread(codes.scale, columns, group_size)


@pytest.fixture
def toy():
    register(Toy())
    yield get_format("toy")
    del registry._formats["toy"]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The scalar kernels, compiled in a tree with one more format."""
    tree = tmp_path_factory.mktemp("toy")
    shutil.copytree(CSRC, tree / "ktops_csrc")
    formats = tree / "ktops_csrc" / "formats"
    shutil.copy(HERE / "toy-inl.h", formats)
    lines = (formats / "formats.def").read_text()
    assert lines.count("#else") == 1 and lines.count("#endif") == 1
    lines = lines.replace("#else", '#include "formats/toy-inl.h"\n#else').replace("#endif", f"{LINE}#endif")
    (formats / "formats.def").write_text(lines)
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-I{tree / 'ktops_csrc'}"]
    sources = [HERE / "decode.cpp", tree / "ktops_csrc" / "core" / "workspace.cpp"]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *flags, *sources, "-o", tree / "decode"], check=True)
    return tree / "decode"


def test_python_knows_it(toy):
    dense = torch.randn(2, 3, 70)
    weight = ktops.quantize(dense, "toy", group_size=32)
    assert weight.format == "toy" and weight.scale.shape == (2, 3, 3)
    assert (toy.dequantize(weight.codes, 70, 32) - dense).abs().max() <= weight.scale.max() / 2
    with pytest.raises(
        ValueError, match="group_size must be one of 0, any multiple of 32 for format 'toy', got 7"
    ):
        ktops.quantize(dense, "toy", group_size=7)


def test_library_without_it_says_so(toy):
    weight = ktops.quantize(torch.randn(2, 3, 70), "toy")
    with pytest.raises(RuntimeError, match=r"weight_format must be one of dense, bf16, .*, got 'toy'"):
        weight.dequantize()


def test_kernels_know_it(toy, program):
    weight = ktops.quantize(torch.randn(2, 9, 70), "toy", group_size=32)
    x = torch.randn(70)
    given = b"".join(t.numpy().tobytes() for t in (weight.weight, weight.scale, x))
    result = subprocess.run([program, "2", "9", "70", "32"], input=given, capture_output=True)
    assert result.returncode == 0
    values = torch.frombuffer(bytearray(result.stdout), dtype=torch.float32)
    expected = toy.dequantize(weight.codes, 70, 32)
    assert torch.equal(values[: expected.numel()], expected.flatten())
    exact = expected[1].double() @ x.double()
    error = (values[expected.numel() :] - exact).norm() / exact.norm()
    assert error <= SAFETY * max(rounding_level(torch.float32, 70), rms(torch.float32))
