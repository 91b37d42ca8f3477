"""Decodes weights by the formulas of docs/formats.md in numpy, independently of ktops.formats."""

import numpy as np
import torch

from ktops import ExpertWeight


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.float8_e4m3fn:
        tensor = tensor.view(torch.uint8)
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _e4m3(codes: np.ndarray) -> np.ndarray:
    """sign, 4 bits of exponent with bias 7, 3 bits of mantissa; exponent 0 is subnormal, S.1111.111 is NaN"""
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float64)
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.where(codes & 0x7F == 0x7F, np.nan, sign * value).astype(np.float32)


def _e2m1(codes: np.ndarray) -> np.ndarray:
    """sign, 2 bits of exponent with bias 1, 1 bit of mantissa"""
    exponent, mantissa = (codes >> 1 & 3).astype(np.int32), (codes & 1).astype(np.float64)
    value = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    return (np.where(codes & 8, -1.0, 1.0) * value).astype(np.float32)


def _nibbles(packed: np.ndarray, columns: int) -> np.ndarray:
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=np.uint8)
    codes[..., 0::2], codes[..., 1::2] = packed & 15, packed >> 4
    return codes[..., :columns]


def _of_columns(values: np.ndarray, rows: int, columns: int, group_size: int) -> np.ndarray:
    """Expands values of groups, [E, rows or blocks of rows, groups], to every row and column."""
    row, column = np.arange(rows), np.arange(columns)
    if values.shape[1] != rows:
        row = row // group_size
    return values[:, row][:, :, column // group_size if group_size else column * 0]


def decode(weight: ExpertWeight) -> torch.Tensor:
    """Returns the float32 weights in any format except those of GGUF."""
    _, rows, columns = weight.shape
    codes, name = _numpy(weight.weight), weight.format
    if name in ("bf16", "fp16", "fp32"):
        return weight.weight.float()
    scale = _numpy(weight.scale)
    if name.startswith("mx"):
        scale = (2.0 ** (scale.astype(np.float64) - 127)).astype(np.float32)
    scale = _of_columns(scale.astype(np.float32), rows, columns, weight.group_size)
    if name == "int8":
        values = codes.astype(np.float32)
    elif name == "int4":
        values = _nibbles(codes, columns).astype(np.float32) - 8
    elif name == "uint4":
        zero = _of_columns(_numpy(weight.zero).astype(np.float32), rows, columns, weight.group_size)
        values = _nibbles(codes, columns).astype(np.float32) - zero
    elif name == "mxfp4":
        values = _e2m1(_nibbles(codes, columns))
    else:
        values = _e4m3(codes)
    return torch.from_numpy(values * scale)
