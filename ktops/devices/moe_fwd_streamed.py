"""kt::moe_fwd_streamed on an accelerator: the experts are copied there in portions and multiplied there.

A call moves the offsets of the experts' routes, int32 [E + 1], down, and up, of each expert that has routes,
its weights, biases and LoRA factors, once, and 4 bytes. Tokens, routes, the output and LoRA factors that are
there already stay on the device.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ktops.devices.grouped import Routes, Segments, accumulator
from ktops.devices.kernels import BACKENDS
from ktops.devices.portions import Portions
from ktops.devices.streams import captured
from ktops.formats import Codes, get_format
from ktops.ops.activation import gate
from ktops.ops.arguments import TENSORS, MoeArguments
from ktops.ops.check_devices import TOKENS, check_devices

PER_EXPERT = tuple(name for name in TENSORS if name not in TOKENS)
"""The arguments with a first dimension of experts."""

DENSE = "dense"


def moe_fwd_streamed(*args) -> Tensor:
    """``kt::moe_fwd_streamed`` with hidden_states on an accelerator."""
    check_devices(torch.ops.kt.moe_fwd_streamed.default, *args)
    *shared, portion_bytes = args
    arguments = MoeArguments(*shared)
    _check(arguments)
    hidden_states, (num_tokens, top_k) = arguments.hidden_states, arguments.topk_ids.shape
    routes = Routes.sort(arguments.topk_ids, arguments.num_experts)
    shape = num_tokens if arguments.reduce else num_tokens * top_k, hidden_states.shape[1]
    dtype = accumulator(hidden_states.dtype) if arguments.reduce else hidden_states.dtype
    output = hidden_states.new_zeros(shape, dtype=dtype)
    for segments, order, y in _outputs(arguments, routes, portion_bytes):
        if arguments.reduce:
            _add(output, arguments, segments, order, y)
        else:
            output[order] = y.to(dtype)
    return output.to(hidden_states.dtype) if arguments.reduce else output.unflatten(0, (num_tokens, top_k))


def _check(arguments: MoeArguments) -> None:
    """Raises what kt::moe_fwd raises for such arguments, which it gets without tokens if their shapes fit.

    Also raises RuntimeError during the capture of a CUDA graph.
    """
    values, (rows, ids, weights, *_) = arguments._asdict(), arguments
    fit = rows.dim() == ids.dim() == 2 and ids.shape == weights.shape and len(ids) == len(rows)
    for name in TENSORS:
        tensor = values[name]
        if tensor is not None and not tensor.is_cpu:
            shape = (0, *tensor.shape[1:]) if fit and name not in PER_EXPERT else tensor.shape
            values[name] = torch.empty((), dtype=tensor.dtype, device="cpu").expand(shape)
    torch.ops.kt.moe_fwd(*values.values())
    if captured(arguments.hidden_states.device):
        raise RuntimeError(
            "kt::moe_fwd_streamed cannot be captured in a CUDA graph, because the host decides which experts "
            "it copies: capture fewer tokens than stream_min_tokens"
        )


def _add(output: Tensor, arguments: MoeArguments, segments: Segments, order: Tensor, y: Tensor) -> None:
    """Adds the weighted rows to those of their tokens.

    An expert's rows are added at once, because the order in which repeated rows are added would be random.
    """
    tokens = order // arguments.topk_ids.shape[1]
    y *= arguments.topk_weights.reshape(-1)[order, None]
    for begin, end in pairwise(segments.bounds):
        output.index_add_(0, tokens[begin:end], y[begin:end])


def _outputs(
    arguments: MoeArguments, routes: Routes, portion_bytes: int
) -> Iterator[tuple[Segments, Tensor, Tensor]]:
    """Yields segments, routes [R] and outputs [R, H] of the experts, some rows at a time."""
    if not routes.experts:
        return
    copied, there = _by_place(arguments)
    capacity = max(1, min(portion_bytes // _bytes_of_an_expert(arguments, copied), len(routes.experts)))
    with Portions(copied, capacity, arguments.hidden_states.device) as portions:
        for begin in range(0, len(routes.experts), capacity):
            experts = routes.experts[begin : begin + capacity]
            with portions.on_device(experts) as portion:
                rest = {name: torch.stack([tensor[e] for e in experts]) for name, tensor in there.items()}
                weights = _decoded(arguments, portion | rest)
                rows = max(1, portion_bytes // _bytes_of_a_row(arguments))
                yield from _outputs_of_portion(arguments, routes, weights, begin, rows)
                del weights


def _outputs_of_portion(
    arguments: MoeArguments, routes: Routes, weights: dict[str, Tensor], begin: int, most_rows: int
) -> Iterator[tuple[Segments, Tensor, Tensor]]:
    """Runs the experts of a portion, the first of which is segment ``begin``."""
    first, last = (routes.segments.bounds[at] for at in (begin, begin + len(weights["gate_up_proj"])))
    for row in range(first, last, most_rows):
        end = min(row + most_rows, last)
        which, segments = routes.segments.between(row, end)
        own = {name: w[which.start - begin : which.stop - begin] for name, w in weights.items()}
        order = routes.order[row:end]
        x = arguments.hidden_states[order // arguments.topk_ids.shape[1]]
        gate_up = _project(x, own, "gate_up", arguments.gate_up_scaling, segments)
        h, _ = gate(arguments.activation, arguments.activation_args, arguments.gating, gate_up)
        yield segments, order, _project(h.to(x.dtype), own, "down", arguments.down_scaling, segments)


def _project(
    rows: Tensor, weights: dict[str, Tensor], prefix: str, scaling: float, segments: Segments
) -> Tensor:
    """Returns x W^T + b + s (x A^T) B^T, unrounded."""
    bias, a, b = (weights.get(f"{prefix}_{name}") for name in ("bias", "lora_A", "lora_B"))
    product = segments.multiply(rows, weights[f"{prefix}_proj"])
    if a is not None and b is not None:
        low_rank = segments.multiply(rows, a.to(rows.dtype)).to(rows.dtype)
        product.add_(segments.multiply(low_rank, b.to(rows.dtype)), alpha=scaling)
    if bias is not None:
        product += bias[segments.of_rows()]
    return product


def _by_place(arguments: MoeArguments) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the tensors of the experts in CPU memory, in the order of their memory, and on the device."""
    given = {name: getattr(arguments, name) for name in PER_EXPERT}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    copied = {name: x.mT if name in _transposed(arguments) else x for name, x in tensors.items() if x.is_cpu}
    return copied, {name: tensor for name, tensor in tensors.items() if not tensor.is_cpu}


def _transposed(arguments: MoeArguments) -> list[str]:
    """Returns the names of the weights that are stored as [E, in, out]."""
    weights = {name: getattr(arguments, name) for name in ("gate_up_proj", "down_proj")}
    return [name for name, weight in weights.items() if weight.stride(1) == 1 != weight.stride(2)]


def _decoded(arguments: MoeArguments, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a portion with its weights [G, out, in] in the dtype of hidden_states."""
    a, (_, hidden_size) = arguments, arguments.hidden_states.shape
    for prefix, name, group_size, columns in (
        ("gate_up", a.gate_up_format, a.gate_up_group_size, hidden_size),
        ("down", a.down_format, a.down_group_size, a.intermediate_size),
    ):
        codes = Codes._make(tensors.pop(f"{prefix}_{part}", None) for part in ("proj", "scale", "zero"))
        weight = codes.weight
        if name != DENSE:
            weight = get_format(name).dequantize(codes, columns, group_size).to(a.hidden_states.dtype)
        tensors[f"{prefix}_proj"] = weight.mT if f"{prefix}_proj" in _transposed(a) else weight
    return tensors


def _bytes_of_an_expert(arguments: MoeArguments, copied: dict[str, Tensor]) -> int:
    """Returns the bytes of an expert in a portion, with the float32 that weights in a format become."""
    (_, hidden_size), size = arguments.hidden_states.shape, arguments.intermediate_size
    nbytes = sum(tensor[0].nbytes for tensor in copied.values())
    for name, elements in (
        (arguments.gate_up_format, arguments.gate_up_rows * hidden_size),
        (arguments.down_format, hidden_size * size),
    ):
        nbytes += 0 if name == DENSE else elements * torch.float32.itemsize
    return nbytes


def _bytes_of_a_row(arguments: MoeArguments) -> int:
    """Returns about as many bytes as the intermediate results of a route take."""
    elements = 2 * arguments.hidden_states.shape[1] + 2 * arguments.gate_up_rows
    return elements * accumulator(arguments.hidden_states.dtype).itemsize


torch.library.impl("kt::moe_fwd_streamed", BACKENDS)(moe_fwd_streamed)
