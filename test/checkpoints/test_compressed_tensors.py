"""Experts packed by compressed-tensors' own compressors, compared with its own decompression."""

import numpy
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from tiny_checkpoints import E, H, I, expect_checkpoint, write_per_expert

from ktops.checkpoints import open_checkpoint

INT4 = {"num_bits": 4, "type": "int"}
FP8 = {"num_bits": 8, "type": "float"}
CASES = {
    "int4 group": ("pack-quantized", {**INT4, "strategy": "group", "group_size": 32}, "int4"),
    "int4 channel": ("pack-quantized", {**INT4, "strategy": "channel"}, "int4"),
    "uint4 group": (
        "pack-quantized",
        {**INT4, "strategy": "group", "group_size": 32, "symmetric": False},
        "uint4",
    ),
    "fp8 channel": ("float-quantized", {**FP8, "strategy": "channel"}, "fp8_e4m3"),
    "fp8 tensor": ("float-quantized", {**FP8, "strategy": "tensor"}, "fp8_e4m3"),
    "int8 channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, "int8"),
}


def maker(compression, arguments):
    compressor = BaseCompressor.get_value_from_registry(compression)
    arguments = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    levels = 240.0 if arguments.type == "float" else 2 ** (arguments.num_bits - 1) - 1

    def make(rng, rows, columns):
        weight = torch.from_numpy(rng.standard_normal((rows, columns)).astype(numpy.float32))
        groups = columns // (arguments.group_size or columns)
        scale = weight.unflatten(-1, (groups, -1)).abs().amax(-1) / levels
        if arguments.strategy == "tensor":
            scale = scale.amax().reshape(1)
        state = {"weight": weight, "weight_scale": scale}
        if not arguments.symmetric:
            state["weight_zero_point"] = torch.from_numpy(rng.integers(-8, 8, scale.shape)).to(torch.int8)
        state = compressor.compress(state, scheme)
        return state, compressor.decompress(state, scheme)["weight"].float()

    return make


@pytest.mark.parametrize("case", CASES)
def test_compressor(tmp_path, case):
    compression, arguments, name = CASES[case]
    dense = write_per_expert(tmp_path, maker(compression, arguments), layers=1)
    checkpoint = open_checkpoint(tmp_path)
    expect_checkpoint(checkpoint, dense)
    assert checkpoint.layers[0].formats == (name, name)
    assert dense[0][0].shape == (E, 2 * I, H)
