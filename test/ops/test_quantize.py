"""kt::quantize returns the bits that the formats specify, with all kernels and any number of threads."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ktops
from ktops.formats import Codes, get_format, names
from ktops.testing.compare import threads
from ktops.testing.isa import available_isas

QUANTIZED = [name for name in names(written=True) if get_format(name).has_quantizer]
GROUPS = dict.fromkeys(("int8", "int4", "uint4"), (0, 32, 128)) | {
    "fp8_e4m3": (0, 128),
    "mxfp8": (32,),
    "mxfp4": (32,),
}
SETTINGS = [
    (name, group_size, method)
    for name in QUANTIZED
    for group_size in GROUPS.get(name, (0,))
    for method in get_format(name).methods
]


def awkward(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Returns weights [2, rows, columns]: normal, zero, constant, of one sign, sparse, ties, tiny, huge."""
    weight = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    kinds = [
        lambda row: row * 0,
        lambda row: torch.full_like(row, 0.75),
        lambda row: torch.full_like(row, -0.75),
        lambda row: row.abs() + 3,
        lambda row: -row.abs() - 3,
        lambda row: row * torch.logspace(-4, 4, columns),
        lambda row: torch.where(torch.arange(columns) % 40 == 1, row, 0),
        lambda row: torch.where(torch.arange(columns) < columns // 2, 0, row),
        lambda row: (row * 4).round() / 4,
        lambda row: torch.arange(columns) % 2 - 0.5,
        lambda row: row * 1e-7,
        lambda row: row * 1e3,
    ]
    for row, kind in enumerate(kinds[:rows]):
        weight[0, row] = kind(weight[0, row])
    return weight.to(dtype)


def width(name: str, columns: int) -> int:
    """Returns the number of columns rounded up to whole blocks of the format."""
    block = {"mxfp8": 32, "mxfp4": 32}.get(name) or getattr(get_format(name), "block", 1)
    return -(-columns // block) * block


def specified(weight: Tensor, name: str, group_size: int, method: str) -> Codes:
    return get_format(name).quantize_reference(weight.float(), group_size, method)


def assert_same(actual: Codes, expected: Codes) -> None:
    for what, got, want in zip(Codes._fields, actual, expected, strict=True):
        assert (got is None) == (want is None), what
        if got is not None:
            assert (got.dtype, got.shape) == (want.dtype, want.shape), what
            assert torch.equal(got.view(torch.uint8), want.contiguous().view(torch.uint8)), what


def check(weight: Tensor, name: str, group_size: int, method: str) -> None:
    expected = specified(weight, name, group_size, method)
    for isa in available_isas():
        with ktops.use_isa(isa):
            assert_same(get_format(name).quantize(weight, group_size, method), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "group_size", "method"), SETTINGS)
def test_bits(name, group_size, method, dtype):
    """300 columns make groups of every size incomplete, and the last byte of 301 half empty."""
    check(awkward(18, width(name, 301), dtype), name, group_size, method)


@pytest.mark.parametrize(("name", "group_size", "method"), [case for case in SETTINGS if case[0] in GROUPS])
def test_sizes_that_only_float32_has(name, group_size, method):
    """Scales become subnormal or 0, or are close to the largest float32."""
    weight = awkward(5, width(name, 70))
    for row, size in enumerate((1e-37, 1e-39, 1e-41, 1e-44, 3e37)):
        weight[1, row] *= size
    check(weight, name, group_size, method)


@settings(max_examples=25)
@given(st.data())
def test_shapes(data):
    name, group_size, method = data.draw(st.sampled_from(SETTINGS))
    if group_size and -1 in get_format(name).group_sizes:
        group_size = 32 * data.draw(st.integers(1, 5))
    rows = data.draw(st.integers(1, 20) | st.integers(125, 131) if name == "fp8_e4m3" else st.integers(1, 20))
    check(awkward(rows, width(name, data.draw(st.integers(1, 300)))), name, group_size, method)


@pytest.mark.parametrize("name", ["int4", "fp8_e4m3", "q4_k"])
def test_strides(name):
    whole = awkward(40, 512, torch.bfloat16)
    group_size = get_format(name).default_group_size
    for weight in (whole[:, 3:30, 256:], whole[:, ::2], whole.mT[:, :, 1::2].contiguous().mT, whole[0, 2]):
        weight = weight.expand(1, *weight.shape) if weight.dim() == 1 else weight
        weight = weight[..., :256] if name == "q4_k" else weight
        actual = get_format(name).quantize(weight, group_size, "rtn")
        assert_same(actual, specified(weight, name, group_size, "rtn"))


@pytest.mark.parametrize(("name", "method"), [("int4", "rtn"), ("uint4", "mse"), ("fp8_e4m3", "rtn")])
def test_threads(name, method):
    """One call is worth 7 threads; 3 threads of Python call at the same time."""
    weight = torch.randn(1, 700, 704, generator=torch.Generator().manual_seed(0)).bfloat16()
    known = get_format(name)

    def quantized(count: int) -> Codes:
        with threads(count):
            return known.quantize(weight, 128, method)

    expected = quantized(1)
    for count in range(2, 8):
        assert_same(quantized(count), expected)
    with ThreadPoolExecutor(3) as pool:
        for codes in pool.map(quantized, (1, 2, 1)):
            assert_same(codes, expected)


def test_other_dtypes_and_dimensions():
    weight = awkward(6, 96)
    expected = specified(weight, "int4", 32, "rtn")
    known = get_format("int4")
    assert_same(known.quantize(weight.double(), 32, "rtn"), expected)
    assert_same(known.quantize(weight[1], 32, "rtn"), expected.map(lambda tensor: tensor[1]))
    assert_same(known.quantize(weight[None], 32, "rtn"), expected.map(lambda tensor: tensor[None]))


def test_formats_of_gguf_need_no_package(monkeypatch):
    weight = awkward(4, 64)
    expected = specified(weight, "q4_0", 0, "rtn")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert torch.equal(ktops.quantize(weight, "q4_0").weight, expected.weight)


@pytest.mark.parametrize("method", ["rtn", "mse", "hqq"])
def test_ranges_beyond_float32(method):
    weight = torch.ones(1, 2, 64)
    weight[0, 1, :2] = torch.tensor([-3e38, 3e38])
    with pytest.raises(ValueError, match=r"finite weights, with ranges .* from -3e\+38 to 3e\+38"):
        ktops.quantize(weight, "uint4", group_size=32, method=method)


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
def test_scales_beyond_float16(name):
    weight = torch.full((1, 2, 64), 1e8)
    with pytest.raises(ValueError, match=r"up to the largest float16, 65504; got weights from 1e\+08"):
        ktops.quantize(weight, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": torch.zeros(4, 64)},
            r"weight must have shape \[num_experts, rows, columns\], got \[4, 64\]",
        ),
        ({"weight": torch.zeros(1, 4, 0)}, r"weight must have at least one column, got shape \[1, 4, 0\]"),
        (
            {"weight": torch.zeros(1, 4, 64).double()},
            "weight must be float32, bfloat16 or float16, got float64",
        ),
        ({"weight_format": "iq4_nl"}, "weight_format must be one of int8, .*, q6_k, got 'iq4_nl'"),
        ({"weight_format": "dense"}, "weight_format must be one of int8, .*, got 'dense'"),
        ({"weight_format": "q4_k", "group_size": 0}, "rows of a multiple of 256 weights, got 64"),
        ({"group_size": 7}, "group_size must be 0 or a multiple of 32 for weight_format 'int4', got 7"),
        ({"group_size": 2**40}, "group_size must be at most 1048576, got 1099511627776"),
        ({"weight_format": "fp8_e4m3"}, "group_size must be 0 or 128 for weight_format 'fp8_e4m3', got 32"),
        ({"weight_format": "mxfp4", "method": "mse"}, "method must be one of rtn for weight_format 'mxfp4'"),
        ({"method": "hqq"}, "method must be one of rtn, mse for weight_format 'int4', got 'hqq'"),
    ],
)
def test_errors(changes, message):
    given = {"weight": torch.zeros(1, 4, 64), "weight_format": "int4", "group_size": 32, "method": "rtn"}
    with pytest.raises(RuntimeError, match=f"kt::quantize: .*{message}"):
        torch.ops.kt.quantize(**given | changes)


@pytest.mark.parametrize(("name", "group_size", "method"), SETTINGS)
def test_opcheck(name, group_size, method):
    utils = ["test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(
        torch.ops.kt.quantize.default, (awkward(3, 256), name, group_size, method), test_utils=utils
    )


def test_no_gradient_of_codes():
    weight = torch.zeros(1, 4, 64, requires_grad=True)
    _, scale, _ = torch.ops.kt.quantize(weight, "int4", 32, "rtn")
    with pytest.raises(RuntimeError, match="kt::quantize has no gradient"):
        scale.sum().backward()
