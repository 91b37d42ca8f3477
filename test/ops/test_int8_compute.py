"""compute="int8": blocks of activations are rounded to int8 and multiplied with integer codes of weights."""

import gguf
import pytest
import torch
from massive_channels import assert_as_good_as_blocks, massive_channels

import ktops
from ktops.formats.gguf_blocks import BLOCKS as BLOCKS_OF_GGML
from ktops.reference.int8 import BLOCK, DIGITS, UNIT, largest_of_blocks, round_blocks, round_digits
from ktops.testing.budgets import forward_budget, relative_error
from ktops.testing.compare import one_thread, random_grad_output, run, threads
from ktops.testing.inputs import densified, moe_inputs
from ktops.testing.paths import use_path
from ktops.testing.weights import GROUPED, in_format

FORMATS = [("int8", 0), ("int8", 32), ("int4", 0), ("int4", 96), ("int4", 128), ("uint4", 0), ("uint4", 32)]
CHUNKS = [("mxfp4", 32), ("q8_0", 0), ("q4_0", 0), ("iq4_nl", 0)]
CHUNK_SIZES = [(1, 256, 256), (3, 1024, 96), (20, 160, 96), (90, 256, 64), (30, 4160, 64)]
SIZES = [
    (1, 256, 256),
    (3, 1024, 98),
    (20, 160, 96),
    (60, 97, 36),
    (90, 256, 64),
    (30, 4160, 64),
    (3, 4352, 64),
]
BLOCKS = ["q4_k", "q5_k", "q6_k", "iq4_xs"]
BLOCK_SIZES = [(1, 256, 256), (3, 4352, 256), (40, 512, 256)]
CASES = [
    *((*format, *size) for format in FORMATS for size in SIZES),
    *((*format, *size) for format in CHUNKS for size in CHUNK_SIZES),
    *((name, 0, *size) for name in BLOCKS for size in BLOCK_SIZES),
]
Q8_0 = gguf.GGMLQuantizationType.Q8_0
ROWS_IN_INTEGERS = {"amx_bf16": 8, "avx512": 32, "avx2": 32, "scalar": 0}
"""The most tokens of an expert, on average, for which "auto" means "int8"."""

LARGEST = {"int8": 0x7F, "q8_0": 0x7F, "mxfp4": 0x77}
"""The byte with the largest codes, if it is not 0xff."""

CODES_OF_A_BLOCK = {
    **dict.fromkeys(("q4_0", "iq4_nl"), slice(2, 18)),
    "q8_0": slice(2, 34),
    "iq4_xs": slice(8, 136),
    "q4_k": slice(16, 144),
    "q5_k": slice(16, 176),
    "q6_k": slice(0, 192),
}


def round_joined(x: torch.Tensor) -> torch.Tensor:
    return round_blocks(x, joined=True)


def rounding(isa: str, inputs: dict, name: str):
    """Returns the rounding of rows multiplied by a weight: to blocks, or with tiles to two digits."""
    weight = inputs[name]
    columns, group = weight.shape[-1], weight.group_size
    if weight.format not in GROUPED:
        return round_blocks
    many = inputs["topk_ids"].numel() > 8 * weight.shape[0]
    if isa == "amx_bf16" and many and (group in (0, 128) or group >= columns):
        return round_digits
    return round_joined if group % UNIT == 0 else round_blocks


def undecided(h: torch.Tensor, joined: bool, budget: float) -> torch.Tensor:
    """Returns what to add to elements so close to the midpoint of two integers that either is right, else 0.

    ``budget`` is the relative error of the row; an element's error may be several times the average.
    """
    padded = torch.nn.functional.pad(h.float(), (0, -len(h) % UNIT))
    scale = largest_of_blocks(padded, joined).unsqueeze(-1).double() / 127
    blocks = padded.double().unflatten(-1, (-1, BLOCK))
    steps = torch.where(scale > 0, blocks / scale, 0)
    beyond = steps - steps.floor() - 0.5
    other = torch.where(steps.round() > steps, -scale, scale)
    errors = 8 * budget * h.float().square().mean().sqrt().double()
    return torch.where(beyond.abs() * scale < errors, other, 0).flatten()[: len(h)]


def expected(isa: str, inputs: dict, output: torch.Tensor) -> torch.Tensor:
    """Returns the output with rounded activations in float64, with undecided ones chosen as in ``output``."""
    x, dense = inputs["hidden_states"], densified(inputs)
    gate_up, down = dense["gate_up_proj"].double(), dense["down_proj"].double()
    reference = torch.zeros(x.shape, dtype=torch.float64)
    coded, budget = rounding(isa, inputs, "gate_up_proj")(x), forward_budget(torch.float32, x.shape[1])
    rounded = rounding(isa, inputs, "down_proj")
    for token, (ids, weights) in enumerate(
        zip(inputs["topk_ids"], inputs["topk_weights"].double(), strict=True)
    ):
        others = []
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = (gate_up[expert] @ coded[token]).chunk(2)
            h = (torch.nn.functional.silu(gate) * up).to(x.dtype)
            reference[token] += weight * (down[expert] @ rounded(h))
            if rounded is not round_digits:
                change = undecided(h, rounded is round_joined, budget)
                others += [weight * change[j] * down[expert, :, j] for j in change.nonzero().flatten()]
        for other in others:
            error = output[token].double() - reference[token]
            if (error - other).norm() < error.norm():
                reference[token] += other
    return reference


def integer_budget(dtype: torch.dtype, rounded, inner_size: int) -> float:
    """Returns the budget of a forward; digits add a step per element of h, whose largest is 4 times RMS."""
    step = 4 / DIGITS if rounded is round_digits else 0
    return forward_budget(dtype, inner_size) + step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name,group_size,num_tokens,hidden_size,intermediate_size",
    CASES,
    ids=[f"{name}:{group}-T{t}-H{h}-I{i}" for name, group, t, h, i in CASES],
)
def test_products_of_integers(isa, name, group_size, num_tokens, hidden_size, intermediate_size, dtype):
    inputs = moe_inputs(T=num_tokens, H=hidden_size, I=intermediate_size, E=4, K=2, dtype=dtype)
    inputs = in_format(inputs, name, group_size)
    output = ktops.moe_sft(**inputs, compute="int8")
    assert output.dtype == dtype
    budget = integer_budget(dtype, rounding(isa, inputs, "down_proj"), hidden_size)
    assert relative_error(output, expected(isa, inputs, output)) <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_tokens", [3, 40])
def test_a_format_and_a_group_size_for_each_projection(isa, num_tokens, dtype):
    inputs = moe_inputs(T=num_tokens, H=256, I=256, E=4, K=2, dtype=dtype)
    inputs |= {
        "gate_up_proj": in_format(inputs, "uint4", 32)["gate_up_proj"],
        "down_proj": in_format(inputs, "int4", 128)["down_proj"],
    }
    output = ktops.moe_sft(**inputs, compute="int8")
    budget = integer_budget(dtype, rounding(isa, inputs, "down_proj"), 256)
    assert relative_error(output, expected(isa, inputs, output)) <= budget


def test_blocks_are_those_of_ggml():
    """Blocks equal Q8_0 except for the scale, which Q8_0 rounds to binary16."""
    x = moe_inputs(T=16, H=256, I=32, E=1, K=1)["hidden_states"]
    x[:, 5] *= 100
    theirs = gguf.dequantize(gguf.quantize(x.numpy(), Q8_0), Q8_0)
    errors = [relative_error(rounded, x) for rounded in (round_blocks(x), torch.from_numpy(theirs))]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("name,group_size", [("int8", 0), ("int4", 128)])
def test_more_tokens_than_panels_have_room_for(isa, name, group_size):
    """With tiles, more than 128 rows have two digits, and there are more than 1024 columns."""
    with use_path("code_tiles"):
        assert_as_good_as_blocks(*massive_channels(name, group_size, 150, 1152, 64))


def test_lora_and_biases_are_added(isa):
    inputs = in_format(moe_inputs(T=20, H=64, I=32, E=4, K=2, lora_rank=2, bias=True), "int8", 0)
    integers, floats = (ktops.moe_sft(**inputs, compute=compute) for compute in ("int8", "bf16"))
    bare = {name: value for name, value in inputs.items() if "lora" not in name and "bias" not in name}
    assert relative_error(ktops.moe_sft(**bare, compute="int8"), floats) > 0.5
    # three rounded factors, of blocks of N(0, 1) with a largest element below 3: 3 / 127 / sqrt(12) each
    assert relative_error(integers, floats) < 2 * 3 * 3 / 127 / 12**0.5


@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name,group_size", [*FORMATS, *CHUNKS, *((name, 0) for name in BLOCKS)])
def test_the_largest_codes(isa, name, group_size, sign, num_tokens):
    """Sums of products of the largest codes and the largest activations do not overflow."""
    inputs = moe_inputs(T=num_tokens, H=512, I=512, E=2, K=2, dtype=torch.float32)
    inputs = in_format(inputs, name, group_size)
    for projection in ("gate_up_proj", "down_proj"):
        weight = inputs[projection].weight.view(torch.uint8)
        blocks = weight.unflatten(-1, (-1, BLOCKS_OF_GGML[name][1])) if name in BLOCKS_OF_GGML else weight
        blocks[..., CODES_OF_A_BLOCK.get(name, slice(None))] = LARGEST.get(name, 0xFF)
    inputs["hidden_states"] = torch.full_like(inputs["hidden_states"], sign / 512)
    output = ktops.moe_sft(**inputs, compute="int8")
    assert output.abs().min() > 0
    budget = integer_budget(torch.float32, rounding(isa, inputs, "down_proj"), 512)
    assert relative_error(output, expected(isa, inputs, output)) <= budget


@pytest.mark.parametrize("num_tokens", [16, 17, 64, 65])
@pytest.mark.parametrize("name,group_size", [("int8", 32), ("int4", 32)])
def test_auto(isa, name, group_size, num_tokens):
    """compute="auto" uses integers if nothing requires a gradient and the kernels are faster with them."""
    inputs = moe_inputs(T=num_tokens, H=64, I=32, E=4, K=2, dtype=torch.bfloat16)
    inputs = in_format(inputs, name, group_size)
    always = isa == "avx512_bf16" or (name == "int4" and isa in ("avx512", "avx2"))
    faster = always or num_tokens * 2 <= 4 * ROWS_IN_INTEGERS[isa]
    compute = "int8" if faster else "bf16"
    assert torch.equal(ktops.moe_sft(**inputs), ktops.moe_sft(**inputs, compute=compute))
    training = inputs | {"hidden_states": inputs["hidden_states"].requires_grad_()}
    assert torch.equal(ktops.moe_sft(**training), ktops.moe_sft(**training, compute="bf16"))


@pytest.mark.parametrize("save", ["activations", "recompute"])
def test_gradients_are_those_of_the_weights(isa, save):
    """Backward treats rounding as the identity, so it computes nearly the same as with compute="bf16"."""
    inputs = in_format(moe_inputs(T=20, H=64, I=32, E=4, K=2, lora_rank=2), "int8", 0)
    grad_output = random_grad_output(inputs)
    integers, floats = (run(inputs, grad_output, compute=compute, save=save) for compute in ("int8", "bf16"))
    for name, value in floats.items():
        error = relative_error(integers[name], value)
        assert 0 < error < 2 * 4 * 3 / 127 / 12**0.5, name


def test_recompute_is_the_same(isa):
    inputs = in_format(moe_inputs(T=20, H=64, I=32, E=4, K=2, dtype=torch.float32), "int4", 32)
    grad_output = random_grad_output(inputs)
    kept, again = (
        run(inputs, grad_output, compute="int8", save=save) for save in ("activations", "recompute")
    )
    for name, value in kept.items():
        assert torch.equal(value, again[name]), name


def test_rows_of_zeros_and_infinities(isa):
    inputs = in_format(moe_inputs(T=5, H=64, I=32, E=4, K=2), "int8", 0)
    inputs["hidden_states"][0] = 0
    inputs["hidden_states"][4] = 1e-38  # 127 times its inverse is infinite
    inputs["hidden_states"][1, 3] = torch.inf
    inputs["hidden_states"][2, 5] = torch.nan
    output = ktops.moe_sft(**inputs, compute="int8")
    assert torch.equal(output[[0, 4]], torch.zeros(2, 64))
    assert output[1:3].isnan().all()
    assert output[3].isfinite().all()


def test_same_result_for_any_number_of_threads(isa):
    inputs = in_format(moe_inputs(T=50, H=128, I=64, E=4, K=2, dtype=torch.bfloat16), "int4", 32)
    with one_thread():
        expected = ktops.moe_sft(**inputs, compute="int8")
    with threads(3):
        assert torch.equal(ktops.moe_sft(**inputs, compute="int8"), expected)


@pytest.mark.parametrize("name", ["fp8_e4m3", "q5_0", "bf16"])
def test_formats_without_integers(name):
    """The format is used in both projections, or in one together with another format."""
    inputs = moe_inputs(T=4, H=256, I=256, E=2, K=2)
    integers = in_format(inputs, "int8", 0)
    floats = in_format(inputs, name, 0)
    for argument, given in (
        ("gate_up_format", floats),
        ("gate_up_format", integers | {"gate_up_proj": floats["gate_up_proj"]}),
        ("down_format", integers | {"down_proj": floats["down_proj"]}),
    ):
        message = rf"compute must be auto or bf16 for {argument} '{name}', got 'int8'"
        with pytest.raises(RuntimeError, match=message):
            ktops.moe_sft(**given, compute="int8")


def test_float64_is_not_rounded():
    inputs = in_format(moe_inputs(T=4, H=64, I=64, E=2, K=2, dtype=torch.float64), "int8", 0)
    with pytest.raises(
        RuntimeError, match="compute must be auto or bf16 for hidden_states in float64, got 'int8'"
    ):
        ktops.moe_sft(**inputs, compute="int8")


def test_unknown_compute():
    with pytest.raises(RuntimeError, match="compute must be one of auto, bf16, int8, got 'fp4'"):
        ktops.moe_sft(**moe_inputs(T=4, H=8, I=8, E=2, K=2), compute="fp4")
