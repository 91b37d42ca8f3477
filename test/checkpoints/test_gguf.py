"""Compares GGUF files written by the gguf package with its own decoding."""

import gguf
import numpy
import pytest
import torch
from tiny_checkpoints import expect_equal, write_gguf

from ktops._warn import warn_once
from ktops.checkpoints import CheckpointError, gguf_file, open_checkpoint

E, H, I = 3, 256, 512  # noqa: E741
WRITTEN = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16", "F32")
SHAPES = {"gate": (E, I, H), "up": (E, I, H), "down": (E, H, I)}


def blocks(rng, shape, kind) -> numpy.ndarray:
    """Quantizes with the package; for types that it only reads, returns random bytes with finite scales."""
    if kind.name in WRITTEN:
        return gguf.quantize(rng.standard_normal(shape).astype(numpy.float32), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 128, (*shape[:-1], shape[-1] // block, size)).astype(numpy.uint8)
    data[..., 1::2] &= 0x3B
    return data.reshape(*shape[:-1], -1)


def write(path, kinds, layers=2, split=None, skip=()):
    """Writes experts in ggml types by projection; returns the weights of every layer as decoded by gguf."""
    rng = numpy.random.default_rng(0)
    fields = {
        "qwen3moe.block_count": layers,
        "tokenizer.ggml.tokens": ["a", "bc", "", "d" * 100],
        "numbers": [1, 2, 3],
    }
    tensors, dense = {"token_embd.weight": rng.standard_normal((5, H)).astype(numpy.float32)}, []
    for layer in range(layers):
        decoded = {}
        for name, kind in kinds.items():
            kind = gguf.GGMLQuantizationType[kind]
            data = blocks(rng, SHAPES[name], kind)
            decoded[name] = torch.from_numpy(gguf.dequantize(data, kind).astype(numpy.float32))
            if name not in skip:
                tensors[f"blk.{layer}.ffn_{name}_exps.weight"] = data, kind
        dense.append((torch.cat([decoded["gate"], decoded["up"]], 1), decoded["down"]))
    write_gguf(path, tensors, fields)
    return dense


def test_types_are_those_of_the_package():
    for number, name in gguf_file.TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name.lower(), gguf.GGML_QUANT_SIZES[kind]) == (name, gguf_file.SIZES[name])
    assert set(gguf_file.TYPES.values()) == set(gguf_file.SIZES)
    for number, dtype in gguf_file.DTYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (1, dtype.itemsize)
    others = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    assert {
        number: name
        for number, name in others.items()
        if number not in {**gguf_file.TYPES, **gguf_file.DTYPES}
    } == gguf_file.OTHER_TYPES


@pytest.mark.parametrize("kind", [*(name.upper() for name in gguf_file.SIZES), "F32", "F16", "BF16"])
def test_type(tmp_path, kind):
    dense = write(tmp_path / "m.gguf", dict.fromkeys(SHAPES, kind), layers=1)
    for path in (tmp_path / "m.gguf", tmp_path):
        (layer,) = open_checkpoint(path).layers
        expect_equal(layer, *dense[0])
    plain = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
    assert layer.formats == (plain.get(kind, kind.lower()),) * 2


def test_down_is_mapped_and_may_be_of_another_type(tmp_path):
    dense = write(tmp_path / "m.gguf", {"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K"})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    for layer, weights in zip(checkpoint.layers, dense, strict=True):
        expect_equal(layer, *weights)
        assert layer.formats == ("q4_k", "q6_k")
        assert layer.read().down_proj.weight.data_ptr() == layer.read().down_proj.weight.data_ptr()
    assert list(checkpoint.other_tensors()) == ["token_embd.weight"]


def test_gate_and_up_of_different_types_are_decoded(tmp_path):
    warn_once.cache_clear()
    dense = write(tmp_path / "m.gguf", {"gate": "Q4_0", "up": "Q8_0", "down": "Q8_0"}, layers=1)
    with pytest.warns(UserWarning, match=r"blk.0.ffn_gate_exps.weight .* is q4_0 and .* q8_0. Both need"):
        (layer,) = open_checkpoint(tmp_path / "m.gguf").layers
        read = layer.read()
    assert read.gate_up_proj.format == "bf16" and read.down_proj.format == "q8_0"
    assert torch.equal(read.gate_up_proj.weight, dense[0][0].bfloat16())
    assert layer.nbytes == read.gate_up_proj.nbytes + read.down_proj.nbytes


def test_split_files(tmp_path):
    kinds = dict.fromkeys(SHAPES, "Q8_0")
    dense = write(tmp_path / "m-00001-of-00002.gguf", kinds, layers=1, skip=("down",))
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002.gguf: cannot be read: .*No such file"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")
    rng = numpy.random.default_rng(1)
    kind = gguf.GGMLQuantizationType.Q8_0
    down = blocks(rng, SHAPES["down"], kind)
    write_gguf(tmp_path / "m-00002-of-00002.gguf", {"blk.0.ffn_down_exps.weight": (down, kind)})
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        (layer,) = open_checkpoint(tmp_path / name).layers
        expect_equal(layer, dense[0][0], torch.from_numpy(gguf.dequantize(down, kind)))


def test_missing_projection_and_unknown_type(tmp_path):
    write(tmp_path / "a.gguf", dict.fromkeys(SHAPES, "Q8_0"), layers=1, skip=("up",))
    with pytest.raises(
        CheckpointError, match=r"blk.0: the up projection of the experts is missing, .*a.gguf"
    ):
        open_checkpoint(tmp_path / "a.gguf").layers[0].check()
    write(tmp_path / "b.gguf", dict.fromkeys(SHAPES, "IQ2_XXS"), layers=1)
    message = r"blk.0.ffn_gate_exps.weight in .*b.gguf: unknown scheme: .* IQ2_XXS, shape \[3, 512, 256\]"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "b.gguf").layers[0].check()


def test_shapes_are_in_weights(tmp_path):
    write(tmp_path / "m.gguf", {"gate": "Q4_K", "up": "IQ1_S", "down": "Q6_K"}, layers=1)
    tensors = open_checkpoint(tmp_path / "m.gguf").tensors
    for name, shape in SHAPES.items():
        view = tensors[f"blk.0.ffn_{name}_exps.weight"]
        assert (view.weights_shape, view.select(1).weights_shape) == (shape, shape[1:])
    assert tensors["token_embd.weight"].weights_shape == (5, H)
