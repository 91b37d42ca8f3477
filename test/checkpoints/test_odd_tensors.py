"""Tensors that other experts lack, that do not describe weights, or that belong to unsupported schemes."""

import numpy
import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import E, H, I, OneLayer, decode, expect_checkpoint, expect_equal, write_per_expert
from tiny_schemes import SCHEMES, mxfp4_deepseek, pack_quantized, plain

import ktops
from ktops.checkpoints import CheckpointError, open_checkpoint

EXPERTS = "model.layers.0.mlp.experts"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize("scheme", ["fp8 blocks", "int8", "pack-quantized", "gptq", "awq", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_dense_matrix_among_quantized_ones(tmp_path, scheme, dtype):
    """The dense matrix is down of expert 2, the ninth."""
    calls = iter(range(1000))

    def make(rng, rows, columns):
        return (plain(dtype) if next(calls) == 8 else SCHEMES[scheme][0])(rng, rows, columns)

    config = {"quantization_config": GPTQ} if scheme == "gptq" else None
    ((gate_up, down),) = write_per_expert(tmp_path, make, layers=1, config=config)
    (layer,) = open_checkpoint(tmp_path).layers
    expected = rf"{EXPERTS}\.2\.down_proj\.weight in .*: expert 2 differs .* Pass weight_format"
    with pytest.raises(CheckpointError, match=expected):
        layer.read()
    model = OneLayer(E, H, I)
    with pytest.raises(CheckpointError, match=expected):
        ktops.load_experts(model, tmp_path)
    assert model.model.layers[0].mlp.experts.gate_up_proj.is_meta
    report = ktops.load_experts(model, tmp_path, "q8_0")
    assert report.formats == {("q8_0", "q8_0"): 1}
    experts = model.model.layers[0].mlp.experts
    for weight, dense in ((experts.gate_up_proj, gate_up), (experts.down_proj, down)):
        assert torch.equal(decode(weight), decode(ktops.quantize(dense, "q8_0")))
    assert torch.equal(decode(layer.read("fp32").down_proj), down)


def test_a_part_of_the_tensors_is_no_other_scheme(tmp_path):
    calls = iter(range(1000))

    def make(rng, rows, columns):
        tensors, dense = pack_quantized(rng, rows, columns)
        if next(calls) == 4:
            del tensors["weight_scale"]
        return tensors, dense

    write_per_expert(tmp_path, make, layers=1)
    (layer,) = open_checkpoint(tmp_path).layers
    message = rf"{EXPERTS}\.1\.up_proj\.weight_scale is missing in .*; other experts have it"
    with pytest.raises(CheckpointError, match=message):
        layer.read("int8")


OF_ACTIVATIONS = (
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "act_scale",
    "k_scale",
    "output_scale",
)


@pytest.mark.parametrize("scheme", ["fp8 per channel", "gptq", "awq", "pack-quantized", "bf16"])
def test_what_is_said_of_activations_is_passed_over(tmp_path, scheme):
    """They are also ignored if only some experts have them."""
    calls = iter(range(1000))

    def make(rng, rows, columns):
        tensors, dense = SCHEMES[scheme][0](rng, rows, columns)
        if next(calls) % 2:
            tensors |= {
                name: torch.ones(shape) for name, shape in zip(OF_ACTIVATIONS, [[], [1]] * 3, strict=True)
            }
        return tensors, dense

    config = {"quantization_config": GPTQ} if scheme == "gptq" else None
    dense = write_per_expert(tmp_path, make, config=config)
    expect_checkpoint(open_checkpoint(tmp_path), dense)


def stacked(folder, more, make=None):
    """Writes stacked experts and other tensors; returns their weights."""
    rng, tensors, dense = numpy.random.default_rng(0), {}, []
    for name, shape in (("gate_up_proj", (2 * I, H)), ("down_proj", (H, I))):
        made = [(make or SCHEMES["fp8 per channel"][0])(rng, *shape) for _ in range(E)]
        for kind in made[0][0]:
            tensors[f"{EXPERTS}.{name}.{kind}"] = torch.stack([parts[kind] for parts, _ in made])
        tensors |= {f"{EXPERTS}.{name}.{kind}": value.clone() for kind, value in more(shape).items()}
        dense.append(torch.stack([weight for _, weight in made]))
    save_file(tensors, folder / "model.safetensors")
    (layer,) = open_checkpoint(folder).layers
    return layer, dense


@pytest.mark.parametrize("shape", [[], [1], [E], [E, 1], [2 * E]])
def test_what_is_said_of_activations_of_stacked_experts(tmp_path, shape):
    layer, dense = stacked(tmp_path, lambda _: {name: torch.ones(shape) for name in OF_ACTIVATIONS})
    expect_equal(layer, *dense)


@pytest.mark.parametrize("of", ["all", "each", "every one"])
def test_the_shape_of_packed_stacked_experts(tmp_path, of):
    shapes = {
        "all": lambda shape: torch.tensor([E, *shape]),
        "each": lambda shape: torch.tensor(shape),
        "every one": lambda shape: torch.tensor([shape] * E),
    }
    layer, dense = stacked(tmp_path, lambda shape: {"weight_shape": shapes[of](shape)}, pack_quantized)
    assert layer.formats == ("int4", "int4")
    expect_equal(layer, *dense)


def modelopt_awq(rng, rows, columns):
    return {**plain(torch.bfloat16)(rng, rows, columns)[0], "pre_quant_scale": torch.ones(columns)}


def int8_zero_points(rng, rows, columns):
    tensors, _ = SCHEMES["int8"][0](rng, rows, columns)
    return {**tensors, "weight_zero_point": torch.ones(rows, 1, dtype=torch.int8)}


def llm_int8(rng, rows, columns):
    return {"weight": torch.zeros(rows, columns, dtype=torch.int8), "SCB": torch.ones(rows)}


def nf4(rng, rows, columns):
    """The other tensors have special names, such as weight.absmax and weight.quant_map."""
    packed = torch.zeros(rows * columns // 2, 1, dtype=torch.uint8)
    return {"weight": packed, "weight.absmax": torch.ones(rows * columns // 64)}


def hqq(rng, rows, columns):
    return {"W_q": torch.zeros(rows, columns // 2, dtype=torch.uint8), "scale": torch.ones(rows, 1)}


def torchao(rng, rows, columns):
    return {"weight_qdata": torch.zeros(rows, columns, dtype=torch.int8), "weight_scale": torch.ones(rows, 1)}


def marlin(rng, rows, columns):
    return {
        "B": torch.zeros(columns // 16, rows * 2, dtype=torch.int32),
        "s": torch.ones(columns // 32, rows),
    }


def mx_integers(rng, rows, columns):
    tensors, _ = mxfp4_deepseek(rng, rows, columns)
    return {"weight": tensors["weight"], "weight_scale": tensors["scale"].view(torch.uint8)}


def with_no_weights(make):
    """Returns what write_per_expert takes, for tests that read no weights."""
    return lambda rng, rows, columns: (make(rng, rows, columns), torch.zeros(rows, columns))


@pytest.mark.parametrize(
    "make,method,message",
    [
        (modelopt_awq, "modelopt", "pre_quant_scale .*: weights for scaled activations"),
        (int8_zero_points, "compressed-tensors", "weight_zero_point .*: 8 bits with zero points: "),
        (llm_int8, "bitsandbytes", "SCB .*: LLM.int8 of bitsandbytes: "),
        (nf4, "bitsandbytes", "weight .*: its scale is missing, or the scheme is unknown"),
        (hqq, "hqq", r"\w+ .*: HQQ: "),
        (torchao, "torchao", r"\w+ .*: torchao: "),
        (marlin, "gptq", r"\w+ .*: Marlin: "),
    ],
)
def test_schemes_that_are_not_read_are_named(tmp_path, make, method, message):
    config = {"quantization_config": {"quant_method": method}}
    write_per_expert(tmp_path, with_no_weights(make), layers=1, config=config)
    (layer,) = open_checkpoint(tmp_path).layers
    with pytest.raises(
        CheckpointError, match=rf"experts\.0\.gate_proj\.{message}.* \(quant_method {method}\)"
    ):
        layer.check()


def test_integers_with_the_scales_of_mxfp4(tmp_path):
    config = {"quantization_config": {"quant_method": "auto-round", "data_type": "mx_int"}}
    write_per_expert(tmp_path, with_no_weights(mx_integers), layers=1, config=config)
    (layer,) = open_checkpoint(tmp_path).layers
    with pytest.raises(CheckpointError, match=r"must be floats, .* says mx_int"):
        layer.check()


def test_scales_multiply_whatever_they_are_called(tmp_path):
    """weight_scale_inv is also a name of the scale."""

    def make(rng, rows, columns):
        tensors, dense = SCHEMES["fp8 blocks"][0](rng, rows, columns)
        name = "weight_scale" if calls.pop() else "weight_scale_inv"
        return {"weight": tensors["weight"], name: tensors["weight_scale_inv"]}, dense

    for named in (True, False):
        calls = [named] * 100
        dense = write_per_expert(tmp_path, make, layers=1)
        expect_checkpoint(open_checkpoint(tmp_path), dense)
