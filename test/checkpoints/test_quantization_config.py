"""Packed weights with and without a quantization config that describes them."""

import numpy
import pytest
import torch
from tiny_checkpoints import expect_checkpoint, write_per_expert
from tiny_schemes import awq, floats, gptq, pack_quantized, tensor

from ktops._warn import warn_once
from ktops.checkpoints import CheckpointError, open_checkpoint
from ktops.checkpoints.quantization_config import Packing, QuantizationConfig

MODULE = "model.layers.0.mlp.experts.3.up_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}


def said(**quantization) -> dict:
    return {"quantization_config": quantization}


@pytest.mark.parametrize(
    "config,offset",
    [
        ({}, None),
        ({"quant_method": "gptq"}, 1),
        ({"quant_method": "gptq", "checkpoint_format": "gptq"}, 1),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, 0),
        ({"quant_method": "gptq", "format": "gptq_v2"}, 0),
        ({"method": "gptq", "format": "gptq_p"}, 0),
        ({"bits": 4, "group_size": 32, "desc_act": True}, 1),
        ({"quant_method": "auto-round"}, 1),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, 0),
        ({"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"}, 0),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, 1),
        ({"quant_method": "auto-round", "packing_format": "auto_round:gptq"}, 1),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"}, 1),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:exllamav2"}, 0),
        ({"quant_method": "ktops"}, None),
    ],
)
def test_kind_of_zero_points(config, offset):
    assert QuantizationConfig(said(**config)).packing(MODULE).zero_offset == offset


@pytest.mark.parametrize(
    "config,expected",
    [
        ({"dynamic": {r"+:.*\.experts\.3\..*": {"bits": 8, "sym": False}}}, (8, 32, False)),
        ({"dynamic": {r".*\.experts\.3\..*": {"bits": 8, "group_size": 64}}}, (8, 64, True)),
        ({"dynamic": {r"-:.*\.experts\.3\..*": {}, r"+:.*": {"bits": 8}}}, (4, 32, True)),
        ({"dynamic": {r"+:.*\.experts\.4\..*": {"bits": 8}, "+:((": {"bits": 2}}}, (4, 32, True)),
        ({"extra_config": {MODULE: {"bits": 8}, r".*up_proj.*": {"bits": 2}}}, (8, 32, True)),
        ({"extra_config": {r".*up_proj.*": {"bits": 2}}}, (2, 32, True)),
        ({"dynamic": None, "extra_config": [], "bits": "4", "sym": 1}, (None, 32, None)),
    ],
)
def test_modules_of_their_own(config, expected):
    packing = QuantizationConfig(said(**{**GPTQ, "sym": True, **config})).packing(MODULE)
    assert (packing.bits, packing.group_size, packing.symmetric) == expected


def test_groups_of_compressed_tensors():
    weights = {"num_bits": 4, "group_size": 32, "symmetric": True, "type": "int"}
    groups = {
        "all": {"targets": ["Linear"], "weights": weights},
        "some": {"targets": ["re:.*up_proj$", "model.norm"], "weights": {**weights, "num_bits": 8}},
        "one": {"targets": [MODULE], "weights": {**weights, "symmetric": False}},
        "damaged": {"targets": "Linear"},
    }
    for key in ("quantization_config", "compression_config"):
        config = QuantizationConfig({key: {"quant_method": "compressed-tensors", "config_groups": groups}})
        assert config.packing(MODULE) == Packing(4, 32, False, data_type="int")
        assert config.packing(MODULE.replace("3", "2")).bits == 8
        assert config.packing(MODULE.replace("up", "down")) == Packing(4, 32, True, data_type="int")


def test_parts_of_a_composite_model():
    thinker, talker = ({**GPTQ, "checkpoint_format": name} for name in ("gptq", "gptq_v2"))
    config = QuantizationConfig(
        {
            "thinker_config": {"text_config": {"quantization_config": thinker}},
            "talker_config": {"quantization_config": talker},
        }
    )
    assert config.packing(f"thinker.{MODULE}").zero_offset == 1
    assert config.packing(f"talker.{MODULE}").zero_offset == 0


def asymmetric(rng, rows, columns, **options):
    return gptq(rng, rows, columns, symmetric=False, **options)


def test_sym_outranks_zero_points(tmp_path):
    def make(rng, rows, columns):
        tensors, dense = gptq(rng, rows, columns)
        return {**tensors, "qzeros": torch.randint_like(tensors["qzeros"], 1 << 30)}, dense

    warn_once.cache_clear()
    dense = write_per_expert(tmp_path, make, config=said(**GPTQ, sym=True))
    with pytest.warns(
        UserWarning, match=r"assumed to be 8, as the quantization config says \(sym: true\)"
    ) as warned:
        expect_checkpoint(open_checkpoint(tmp_path), dense)
    assert len(warned) == 1


def test_zero_points_without_a_config(tmp_path):
    warn_once.cache_clear()
    dense = write_per_expert(tmp_path, asymmetric)
    with pytest.warns(UserWarning, match="nothing in .* assuming minus one, as in gptq") as warned:
        expect_checkpoint(open_checkpoint(tmp_path), dense)
    assert len(warned) == 1


def eight_bits(rng, rows, columns, *, group=32, reorder=False, zero=128):
    """8-bit GPTQ with zero points stored unchanged."""
    codes = rng.integers(0, 256, (columns, rows)).astype(numpy.uint8)
    scales = floats(rng, columns // group, rows).half()
    g_idx = numpy.arange(columns, dtype=numpy.int32) // group
    if reorder:
        g_idx = rng.permutation(g_idx)
    zeros = numpy.full((columns // group, rows), zero, numpy.uint8)
    dense = (tensor(codes).float() - zero) * scales.float()[g_idx]
    tensors = {
        "qweight": tensor(codes.T).view(torch.int32).T.contiguous(),
        "qzeros": tensor(zeros).view(torch.int32),
        "scales": scales,
        "g_idx": tensor(g_idx),
    }
    return tensors, dense.T


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("with_g_idx", [False, True])
@pytest.mark.filterwarnings("ignore:ktops. nothing in")
def test_gptq_of_8_bits(tmp_path, with_config, with_g_idx):
    def make(rng, rows, columns):
        tensors, dense = eight_bits(rng, rows, columns)
        return {k: t for k, t in tensors.items() if with_g_idx or k != "g_idx"}, dense

    config = said(**{**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}) if with_config else None
    dense = write_per_expert(tmp_path, make, layers=1, config=config)
    checkpoint = open_checkpoint(tmp_path)
    expect_checkpoint(checkpoint, dense)
    assert checkpoint.layers[0].formats == ("int8", "int8")
    assert checkpoint.layers[0].read().down_proj.group_size == 32


@pytest.mark.filterwarnings("ignore:ktops. the GPTQ weights were quantized with reordered")
def test_gptq_of_8_bits_in_an_order_of_its_own(tmp_path):
    def make(rng, rows, columns):
        tensors, dense = eight_bits(rng, rows, columns, reorder=True, zero=100)
        return tensors, dense.half().float()

    config = said(**{**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"})
    dense = write_per_expert(tmp_path, make, layers=1, config=config)
    expect_checkpoint(open_checkpoint(tmp_path), dense)


def narrow(bits):
    """Returns a maker of tensors with the shapes of GPTQ with fewer bits."""

    def make(rng, rows, columns):
        groups = columns // 32
        tensors = {
            "qweight": torch.zeros(columns * bits // 32, rows, dtype=torch.int32),
            "qzeros": torch.zeros(groups, rows * bits // 32, dtype=torch.int32),
            "scales": torch.ones(groups, rows).half(),
        }
        return tensors, torch.zeros(rows, columns)

    return make


def with_other_zero_points(rng, rows, columns):
    return eight_bits(rng, rows, columns, zero=100)


def packed_without_shape(rng, rows, columns):
    tensors, dense = pack_quantized(rng, rows, columns)
    del tensors["weight_shape"]
    return tensors, dense


def awq_of_8_bits(rng, rows, columns):
    tensors, dense = awq(rng, rows, columns)
    tensors |= {name: tensors[name].repeat(1, 2) for name in ("qweight", "qzeros")}
    return tensors, dense


def gemv(rng, rows, columns):
    """Returns tensors of AutoAWQ, with rows of K / 8 words."""
    tensors = {
        "qweight": torch.zeros(rows, columns // 8, dtype=torch.int32),
        "qzeros": torch.zeros(rows, 4, dtype=torch.int32),
        "scales": torch.ones(rows, 32).half(),
    }
    return tensors, torch.zeros(rows, columns)


COMPRESSED = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32, "symmetric": False}}


@pytest.mark.parametrize(
    "make,config,message",
    [
        (narrow(2), None, "qweight in .* must have 4 bits, or 8 bits with a zero point of 128, got 2 bits"),
        (narrow(3), GPTQ, "qweight in .* got 3 bits"),
        (with_other_zero_points, {**GPTQ, "bits": 8}, "qweight in .* got 8 bits with other zero points"),
        (
            packed_without_shape,
            {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 2}}}},
            "weight_packed in .* got 2 bits",
        ),
        (
            awq_of_8_bits,
            {"quant_method": "awq", "bits": 8},
            "qweight in .* AWQ weights must have 4 bits, got 8 bits",
        ),
        (gemv, {"quant_method": "awq", "version": "gemv"}, "neither GPTQ nor AWQ .* the layout 'gemv'"),
        (awq, {"quant_method": "awq", "version": "gemv_fast"}, "unknown scheme: the layout 'gemv_fast'"),
        (gptq, {**GPTQ, "checkpoint_format": "marlin"}, "unknown scheme: the layout 'marlin'"),
        (pack_quantized, {"config_groups": {"a": COMPRESSED}}, "weight_zero_point is missing"),
    ],
)
def test_refused(tmp_path, make, config, message):
    write_per_expert(tmp_path, make, layers=1, config=said(**config) if config else None)
    (layer,) = open_checkpoint(tmp_path).layers
    with pytest.raises(CheckpointError, match=rf"experts\.0\.gate_proj\..*{message}"):
        layer.check()


def test_shapes_outrank_the_config(tmp_path):
    """The config says 8 bits and groups of 64; the tensors have 4 bits and groups of 32."""
    config = said(**{**GPTQ, "bits": 8, "group_size": 64, "sym": True})
    dense = write_per_expert(tmp_path, gptq, hidden=128, config=config)
    checkpoint = open_checkpoint(tmp_path)
    expect_checkpoint(checkpoint, dense)
    assert checkpoint.layers[0].read().gate_up_proj.group_size == 32


def test_zero_points_of_pack_quantized_that_are_not_packed(tmp_path):
    """Zero points are int8 [N, G], as early compressed-tensors wrote them."""

    def make(rng, rows, columns):
        tensors, _ = pack_quantized(rng, rows, columns)
        zero = tensor(rng.integers(-8, 8, (rows, columns // 32)).astype(numpy.int8))
        packed = tensors["weight_packed"].view(torch.uint8)
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        spread = [t.float().repeat_interleave(32, 1) for t in (zero, tensors["weight_scale"])]
        return {**tensors, "weight_zero_point": zero}, (codes.float() - 8 - spread[0]) * spread[1]

    dense = write_per_expert(tmp_path, make, layers=1)
    checkpoint = open_checkpoint(tmp_path)
    expect_checkpoint(checkpoint, dense)
    assert checkpoint.layers[0].formats == ("uint4", "uint4")


def test_int8_in_groups(tmp_path):
    def make(rng, rows, columns):
        weight = tensor(rng.integers(-128, 128, (rows, columns)).astype(numpy.int8))
        scale = floats(rng, rows, columns // 32)
        tensors = {"weight": weight, "weight_scale": scale, "weight_zero_point": torch.zeros_like(scale)}
        return tensors, weight.float() * scale.repeat_interleave(32, 1)

    dense = write_per_expert(tmp_path, make, layers=1)
    checkpoint = open_checkpoint(tmp_path)
    expect_checkpoint(checkpoint, dense)
    assert checkpoint.layers[0].read().gate_up_proj.group_size == 32
