"""Calls of kt::moe_fwd on streams of CUDA that need no GPU."""

import weakref

import torch
from torch import Tensor

from ktops.devices import streams
from ktops.ops.arguments import MoeArguments
from ktops.testing.fake_cuda import FakeCuda, Stream
from ktops.testing.inputs import moe_inputs, op_arguments

SIZES = {"T": 5, "H": 40, "I": 24, "E": 5, "K": 3}


def arguments(seed: int = 0, **options) -> MoeArguments:
    """Returns random arguments of kt::moe_fwd."""
    sizes = {name: options.pop(name) for name in SIZES if name in options}
    return op_arguments(moe_inputs(**SIZES | sizes, seed=seed, **options))


def expected(given: MoeArguments) -> Tensor:
    return torch.ops.kt.moe_fwd(*given)


def watched(tensor: Tensor) -> tuple[Tensor, weakref.ref]:
    """Returns a copy of a tensor, and a reference that dies with its memory."""
    array = tensor.contiguous().view(torch.uint8).numpy().copy()
    return torch.from_numpy(array).view(tensor.dtype).view(tensor.shape), weakref.ref(array)


def run(cuda: FakeCuda, stream: Stream, given: MoeArguments) -> Tensor:
    """Computes one call on the stream and waits for it."""
    with cuda.use(stream):
        output = streams.begin(given).result()
    cuda.synchronize(stream)
    return output


def failing() -> MoeArguments:
    """Returns arguments whose intermediate results do not fit into the address space."""
    given, size = arguments(T=2**17, H=1, I=1, E=1, K=4, dtype=torch.bfloat16), 1 << 27
    weights = {"gate_up_proj": given.gate_up_proj[:, :1].expand(1, 2 * size, 1)}
    weights["down_proj"] = given.down_proj.expand(1, 1, size)
    return given._replace(**weights, intermediate_size=size)
