"""Random weights in every format."""

import torch
from torch import Tensor

from ktops.formats import Codes, ExpertWeight, get_format, names, quantize
from ktops.formats.gguf_blocks import GgufBlocks

HALVES = {
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,),
    "iq4_xs": (0,),
}  # fmt: skip
"""Offsets of the binary16 numbers d and dmin in a block, for formats whose other bytes are arbitrary."""

GROUPED = ("int8", "int4", "uint4")


def variants(columns: int) -> list[tuple[str, int]]:
    """Returns (format, group size) for every format that supports rows of ``columns`` weights."""
    found = []
    for name in names():
        known = get_format(name)
        try:
            known.row_elements(columns)
        except ValueError:
            continue
        sizes = (0, 32, 128) if -1 in known.group_sizes else known.group_sizes
        found += [(name, size) for size in sizes]
    return found


def random_weight(dense: Tensor, name: str, group_size: int, seed: int = 0) -> ExpertWeight:
    """Returns weights [E, N, K] in a format: the dense weights quantized, or random codes of similar size.

    k-quants and i-quants get random codes, because quantizing does not produce all values of their bytes.
    """
    known = get_format(name)
    if not isinstance(known, GgufBlocks) or name not in HALVES:
        return quantize(dense, name, group_size=group_size)
    generator = torch.Generator().manual_seed(seed)
    num_experts, rows, columns = dense.shape
    shape = (num_experts, rows, known.row_elements(columns) // known.block_bytes, known.block_bytes)
    blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    d = torch.randn(shape[:-1], generator=generator)

    def put(values: Tensor) -> Tensor:
        for place in HALVES[name]:
            blocks[..., place : place + 2] = values.half().unsqueeze(-1).view(torch.uint8)
        return blocks.flatten(2)

    size = known.dequantize(Codes(put(d)), columns, 0).std()
    return ExpertWeight(name, dense.shape, put(d * (dense.float().std() / size)), dtype=dense.dtype)


def in_format(inputs: dict, name: str, group_size: int) -> dict:
    """Returns the inputs of :func:`ktops.testing.inputs.moe_inputs` with both weights in a format."""
    weights = {
        key: random_weight(inputs[key], name, group_size, seed)
        for seed, key in enumerate(("gate_up_proj", "down_proj"))
    }
    return inputs | weights
