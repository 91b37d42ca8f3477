"""Weight formats: decoding bit for bit, output and gradients compared with float64, for all kernels."""

import pytest
import torch
from decoders import decode

import ktops
from ktops import ExpertWeight, reference
from ktops.formats import get_format, names
from ktops.formats.gguf_blocks import BLOCKS
from ktops.testing.compare import check_against_reference, one_thread, random_grad_output, run, threads
from ktops.testing.inputs import densified, moe_inputs, op_arguments
from ktops.testing.paths import paths_taken, use_path
from ktops.testing.weights import in_format, random_weight, variants

EVERY = variants(256)
ANY_ROW = variants(97)
PLAIN = [name for name in names() if name not in BLOCKS]


def specified(weight: ExpertWeight) -> torch.Tensor:
    return get_format(weight.format).dequantize(weight.codes, weight.shape[-1], weight.group_size)


def decoded(weight: ExpertWeight) -> torch.Tensor:
    return torch.ops.kt.dequantize(*weight.codes, weight.format, weight.group_size, weight.shape[-1])


def assert_identical(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_every_format_is_tested():
    assert {name for name, _ in EVERY} == set(names())
    assert set(PLAIN) == set(names()) - set(BLOCKS)


@pytest.mark.parametrize("name,group_size", EVERY)
def test_decoding(isa, name, group_size):
    dense = torch.randn(2, 35, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    weight = random_weight(dense, name, group_size)
    assert_identical(decoded(weight), specified(weight))
    if name in PLAIN:
        assert_identical(decoded(weight), decode(weight))


@pytest.mark.parametrize("name,group_size", ANY_ROW)
@pytest.mark.parametrize("rows,columns", [(1, 1), (3, 31), (130, 33), (5, 97), (2, 129)])
def test_decoding_of_rows_that_end_within_a_group(isa, name, group_size, rows, columns):
    weight = random_weight(torch.randn(2, rows, columns), name, group_size)
    assert_identical(decoded(weight), decode(weight))


def every_code(name: str) -> ExpertWeight:
    """Returns one row with each byte, in groups whose scales differ."""
    codes = torch.arange(256, dtype=torch.uint8).view(get_format(name).dtype).reshape(1, 1, 256)
    columns = 512 if name in ("mxfp4", "int4") else 256
    scale = torch.tensor([0, 1, 100, 126, 127, 128, 200, 240] * 2, dtype=torch.uint8)[
        None, None, : columns // 32
    ]
    group_size = 32
    if not name.startswith("mx"):
        scale, group_size = torch.tensor([-0.037]).reshape(1, 1, 1), 0
    return ExpertWeight(name, (1, 1, columns), codes, scale, group_size=group_size)


ONE_CODE_A_BYTE = ["fp8_e4m3", "mxfp8", "mxfp4", "int8", "int4"]


@pytest.mark.parametrize("name", ONE_CODE_A_BYTE)
def test_every_code(isa, name):
    weight = every_code(name)
    assert_identical(decoded(weight), decode(weight))


def few_rows(tokens: torch.Tensor, weight: ExpertWeight) -> torch.Tensor:
    """Returns relu(tokens @ weight[0].T), by products that decode each weight as they use it."""
    ids, ones = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    down = torch.ones(1, weight.shape[-1], 1)
    with ktops.profile() as profile:
        outputs = [
            ktops.moe_sft(
                row[None], ids, ones, weight, down, gating="none", activation="relu", compute="bf16"
            )[:, :1]
            for row in tokens
        ]
    assert paths_taken(profile, "gate_up") == {"decoded_dots"}
    return torch.cat(outputs)[:, 0]


@pytest.mark.parametrize("name", ONE_CODE_A_BYTE)
def test_products_with_every_code(isa, name):
    weight = every_code(name)
    exact = decode(weight).flatten()
    if weight.weight.dtype == torch.float8_e4m3fn:
        weight.weight.view(torch.uint8)[0, 0, exact.isnan()] = 0  # each would be a part of all sums
        exact = exact.nan_to_num(0)
    one_hot = torch.eye(exact.numel())
    assert_identical(few_rows(one_hot, weight), exact.relu())
    assert_identical(few_rows(-one_hot, weight), (-exact).relu())


@pytest.mark.parametrize("name", ["fp8_e4m3", "mxfp8"])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("column", [0, 40, 95])
def test_products_with_nan(isa, name, code, column):
    codes = torch.full((1, 1, 96), 0x38, dtype=torch.uint8)
    codes[0, 0, column] = code
    scale = torch.full((1, 1, 3), 127, dtype=torch.uint8) if name == "mxfp8" else torch.ones(1, 1, 1)
    group_size = 32 if name == "mxfp8" else 0
    weight = ExpertWeight(name, (1, 1, 96), codes.view(torch.float8_e4m3fn), scale, group_size=group_size)
    assert few_rows(torch.ones(1, 96), weight).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8])
def test_dtypes_of_zero_points(isa, dtype):
    weight = ktops.quantize(torch.randn(2, 9, 96), "uint4", group_size=32)
    zero = weight.zero.to(dtype)
    weight = ExpertWeight("uint4", weight.shape, weight.weight, weight.scale.half(), zero, group_size=32)
    assert_identical(decoded(weight), decode(weight))


@pytest.mark.parametrize("path", ["decoded_dots", "dots", "panels"])
@pytest.mark.parametrize("name,group_size", EVERY)
def test_output_and_gradients(isa, name, group_size, path):
    num_tokens = 3 if path == "decoded_dots" else 20
    inputs = moe_inputs(
        T=num_tokens, H=256, I=256, E=3, K=2, dtype=torch.bfloat16, lora_rank=(2, 3), bias=True
    )
    with use_path(path), ktops.profile() as profile:
        check_against_reference(in_format(inputs, name, group_size))
    in_place = name == "bf16" and path == "decoded_dots"  # used like a dense weight
    assert (path in paths_taken(profile, "gate_up", "down")) != in_place


@pytest.mark.parametrize(
    "name,dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
@pytest.mark.parametrize("num_tokens", [1, 20, 70])
def test_a_format_that_is_the_dtype_has_the_bits_of_dense_weights(isa, num_tokens, name, dtype):
    """Experts that lie in files have such a format."""
    inputs = moe_inputs(T=num_tokens, H=128, I=64, E=3, K=2, dtype=dtype, lora_rank=2, bias=True)
    grad_output = random_grad_output(inputs)
    names = ("hidden_states", "gate_up_lora_B", "down_lora_A")
    dense = run(inputs, grad_output, names)
    for result, value in run(in_format(inputs, name, 0), grad_output, names).items():
        assert torch.equal(value, dense[result]), result


@pytest.mark.parametrize("num_tokens", [1, 7, 40])
@pytest.mark.parametrize("name,group_size", ANY_ROW)
def test_sizes_that_fill_no_group(isa, name, group_size, num_tokens):
    inputs = moe_inputs(T=num_tokens, H=97, I=36, E=4, K=2, dtype=torch.bfloat16, lora_rank=2)
    check_against_reference(in_format(inputs, name, group_size))


def test_streams_of_rows_and_what_they_leave_over(isa):
    inputs = moe_inputs(T=3, H=1024, I=98, E=3, K=2, dtype=torch.bfloat16)
    check_against_reference(in_format(inputs, "fp8_e4m3", 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", ["int4", "fp8_e4m3", "q4_k"])
def test_other_activations(isa, name, dtype):
    inputs = moe_inputs(T=40, H=256, I=256, E=3, K=2, dtype=dtype, lora_rank=2)
    check_against_reference(in_format(inputs, name, get_format(name).default_group_size), save="recompute")


PAIRS = [
    (("q4_k", 0), ("q6_k", 0)),
    (("q4_k", 0), None),
    (("int4", 64), ("int4", 32)),
    (("uint4", 32), ("int8", 0)),
    (("fp8_e4m3", 128), ("mxfp4", 32)),
]
"""Formats and group sizes of gate_up_proj and down_proj; None means dense."""


def in_formats(inputs: dict, gate_up: tuple[str, int] | None, down: tuple[str, int] | None) -> dict:
    formats = {"gate_up_proj": gate_up, "down_proj": down}
    return inputs | {name: random_weight(inputs[name], *given) for name, given in formats.items() if given}


@pytest.mark.parametrize("num_tokens", [9, 40])
@pytest.mark.parametrize("gate_up,down", PAIRS)
def test_a_format_and_a_group_size_for_each_projection(isa, gate_up, down, num_tokens):
    dense = moe_inputs(T=num_tokens, H=256, I=256, E=3, K=2, dtype=torch.bfloat16)
    inputs = in_formats(dense, gate_up, down)
    check_against_reference(inputs)
    _, alone, *_ = torch.ops.kt.moe_sft_fwd(*op_arguments(in_formats(dense, gate_up, None)), "activations")
    _, beside, *_ = torch.ops.kt.moe_sft_fwd(*op_arguments(inputs), "activations")
    assert_identical(beside, alone)


@pytest.mark.parametrize("gate_up,down", PAIRS)
def test_the_reference_decodes_each_projection(gate_up, down):
    inputs = in_formats(moe_inputs(T=9, H=256, I=256, E=3, K=2), gate_up, down)
    decoded = reference.moe_fwd(op_arguments(densified(inputs)))
    assert_identical(reference.moe_fwd(op_arguments(inputs)), decoded)


def test_long_rows(isa):
    """Rows have more columns than one pass of reading scales or decoding handles."""
    inputs = moe_inputs(T=33, H=4384, I=64, E=2, K=1, dtype=torch.bfloat16)
    check_against_reference(in_format(inputs, "int4", 32))


@pytest.mark.parametrize("name,group_size", [("int4", 32), ("q4_0", 0), ("fp8_e4m3", 0)])
def test_codes_anywhere_in_memory(isa, name, group_size):
    """Weights are some experts of a tensor, at an odd address with gaps between rows, as in a mapped file."""
    weight = random_weight(torch.randn(4, 6, 64), name, group_size)
    codes = weight.weight.view(torch.uint8)
    memory = torch.full((4, 7, codes.shape[2] + 5), 0xFF, dtype=torch.uint8).flatten()
    place = memory[1:].as_strided((4, 6, codes.shape[2]), (7 * (codes.shape[2] + 5), codes.shape[2] + 5, 1))
    place.copy_(codes)
    scale = None if weight.scale is None else weight.scale[1:3]
    part = ExpertWeight(name, (2, 6, 64), place.view(weight.weight.dtype)[1:3], scale, group_size=group_size)
    assert_identical(decoded(part), decoded(weight)[1:3])


def test_number_of_threads_changes_nothing(isa):
    inputs = in_format(moe_inputs(T=50, H=128, I=64, E=4, K=2, dtype=torch.bfloat16, lora_rank=2), "int4", 32)
    grad_output = torch.ones_like(inputs["hidden_states"])
    with one_thread():
        expected = run(inputs, grad_output)
    with threads(3):
        actual = run(inputs, grad_output)
    for name, value in actual.items():
        assert_identical(value, expected[name])
