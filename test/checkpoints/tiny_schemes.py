"""Random matrices in the tensors of every scheme, and the weights they encode, computed from the formulas.

``make(rng, rows, columns)`` returns the tensors of a matrix [rows, columns] by name suffix, and the weights
in float32.
"""

import numpy
import torch

E2M1 = numpy.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], numpy.float32)


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(numpy.ascontiguousarray(array))


def floats(rng, *shape) -> torch.Tensor:
    return tensor(rng.standard_normal(shape).astype(numpy.float32))


def words(codes, order=range(8)) -> torch.Tensor:
    """Packs integers [..., 8 n] into int32 [..., n], with code order[i] of each eight in nibble i."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8).astype(numpy.uint32)
    packed = numpy.zeros(eights.shape[:-1], numpy.uint32)
    for nibble, column in enumerate(order):
        packed |= eights[..., column] << numpy.uint32(4 * nibble)
    return tensor(packed.view(numpy.int32))


def plain(dtype):
    def make(rng, rows, columns):
        weight = floats(rng, rows, columns).to(dtype)
        return {"weight": weight}, weight.float()

    return make


def float8(rng, rows, columns) -> torch.Tensor:
    return floats(rng, rows, columns).mul(60).to(torch.float8_e4m3fn)


def fp8_blocks(rng, rows, columns, dtype=torch.float32):
    weight = float8(rng, rows, columns)
    scale = floats(rng, -(-rows // 128), -(-columns // 128)).to(dtype)
    dense = torch.empty(rows, columns)
    for row in range(rows):
        for block in range(scale.shape[1]):
            part = slice(128 * block, 128 * block + 128)
            dense[row, part] = weight[row, part].float() * scale[row // 128, block].float()
    return {"weight": weight, "weight_scale_inv": scale}, dense


def fp8_blocks_bf16(rng, rows, columns):
    return fp8_blocks(rng, rows, columns, torch.bfloat16)


def fp8_channel(rng, rows, columns):
    weight, scale = float8(rng, rows, columns), floats(rng, rows, 1).to(torch.bfloat16)
    return {"weight": weight, "weight_scale": scale}, weight.float() * scale.float()


def fp8_tensor(rng, rows, columns):
    weight, scale = float8(rng, rows, columns), floats(rng, 1)
    tensors = {"weight": weight, "weight_scale": scale, "input_scale": floats(rng, 1)}
    return tensors, weight.float() * scale


def int8_channel(rng, rows, columns):
    weight, scale = tensor(rng.integers(-127, 128, (rows, columns), numpy.int8)), floats(rng, rows, 1)
    return {"weight": weight, "weight_scale": scale}, weight.float() * scale


def pack_quantized(rng, rows, columns, group=32):
    codes = rng.integers(0, 16, (rows, columns))
    scale = floats(rng, rows, columns // group).to(torch.bfloat16)
    dense = (tensor(codes).float() - 8) * scale.float().repeat_interleave(group, 1)
    shape = torch.tensor([rows, columns])
    return {"weight_packed": words(codes), "weight_scale": scale, "weight_shape": shape}, dense


def gptq(rng, rows, columns, *, symmetric=True, reorder=False, group=32, offset=1):
    codes = rng.integers(0, 16, (columns, rows))
    zeros = rng.integers(1, 17, (columns // group, rows))
    if symmetric:
        zeros[:] = 8
    scales = floats(rng, columns // group, rows).to(torch.float16)
    g_idx = numpy.arange(columns, dtype=numpy.int32) // group
    if reorder:
        g_idx = rng.permutation(g_idx)
    dense = torch.empty(rows, columns)
    for k in range(columns):
        g = g_idx[k]
        dense[:, k] = (tensor(codes[k]).float() - tensor(zeros[g]).float()) * scales[g].float()
    tensors = {
        "qweight": words(codes.T).T.contiguous(),
        "qzeros": words(zeros - offset),
        "scales": scales,
        "g_idx": tensor(g_idx),
    }
    return tensors, dense


def gptq_zero_points(rng, rows, columns):
    return gptq(rng, rows, columns, symmetric=False)


def gptq_act_order(rng, rows, columns):
    """Dense fp16, rounded once."""
    tensors, dense = gptq(rng, rows, columns, symmetric=False, reorder=True)
    return tensors, dense.half().float()


def awq(rng, rows, columns, group=32):
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes = rng.integers(0, 16, (columns, rows))
    zeros = rng.integers(0, 16, (columns // group, rows))
    scales = floats(rng, columns // group, rows).to(torch.float16)
    dense = torch.empty(rows, columns)
    for k in range(columns):
        difference = tensor(codes[k] - zeros[k // group]).float()
        dense[:, k] = difference * scales[k // group].float()
    return {"qweight": words(codes, order), "qzeros": words(zeros, order), "scales": scales}, dense


def powers(rng, rows, columns) -> numpy.ndarray:
    return rng.integers(110, 135, (rows, columns // 32)).astype(numpy.uint8)


def spread_powers(exponents) -> torch.Tensor:
    return tensor(numpy.repeat(numpy.exp2(exponents.astype(numpy.float64) - 127), 32, 1)).float()


def e2m1(rng, rows, columns):
    """Returns bytes [rows, columns / 2] and the values of their nibbles, low nibble first."""
    codes = rng.integers(0, 256, (rows, columns // 2)).astype(numpy.uint8)
    values = numpy.empty((rows, columns), numpy.float32)
    values[:, 0::2], values[:, 1::2] = E2M1[codes & 15], E2M1[codes >> 4]
    return codes, tensor(values)


def mxfp4_deepseek(rng, rows, columns):
    codes, values = e2m1(rng, rows, columns)
    scale = powers(rng, rows, columns)
    tensors = {"weight": tensor(codes.view(numpy.int8)), "scale": tensor(scale).view(torch.float8_e8m0fnu)}
    return tensors, values * spread_powers(scale)


def mxfp4_gpt_oss(rng, rows, columns):
    codes, values = e2m1(rng, rows, columns)
    scale = powers(rng, rows, columns)
    tensors = {"blocks": tensor(codes.reshape(rows, columns // 32, 16)), "scales": tensor(scale)}
    return tensors, values * spread_powers(scale)


def mxfp8(rng, rows, columns):
    weight, scale = float8(rng, rows, columns), powers(rng, rows, columns)
    return {"weight": weight, "weight_scale_inv": tensor(scale)}, weight.float() * spread_powers(scale)


SCHEMES = {
    "bf16": (plain(torch.bfloat16), "bf16"),
    "fp16": (plain(torch.float16), "fp16"),
    "fp32": (plain(torch.float32), "fp32"),
    "fp8 blocks": (fp8_blocks, "fp8_e4m3"),
    "fp8 blocks bf16": (fp8_blocks_bf16, "fp8_e4m3"),
    "fp8 per channel": (fp8_channel, "fp8_e4m3"),
    "fp8 per tensor": (fp8_tensor, "fp8_e4m3"),
    "int8": (int8_channel, "int8"),
    "pack-quantized": (pack_quantized, "int4"),
    "gptq": (gptq, "int4"),
    "gptq zero points": (gptq_zero_points, "uint4"),
    "gptq act-order": (gptq_act_order, "fp16"),
    "awq": (awq, "uint4"),
    "mxfp4": (mxfp4_deepseek, "mxfp4"),
    "mxfp8": (mxfp8, "mxfp8"),
}
"""Maps names to (make, the ktops format into which it is read)."""
