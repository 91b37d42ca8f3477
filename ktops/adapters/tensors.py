"""Checks and reads the tensors of factors."""

from functools import partial

import torch
from torch import Tensor

from ktops.adapters.base import Stacks
from ktops.adapters.config import LoraSettings
from ktops.adapters.errors import AdapterError
from ktops.adapters.factors import Factors
from ktops.checkpoints.view import View


def expect(view: View, shape: tuple[int, ...], weight: str) -> None:
    """Raises AdapterError unless the factor of a weight has the shape."""
    if view.shape != shape:
        raise AdapterError(
            f"{view}: must have shape {list(shape)} to fit {weight} of the base model, got "
            f"{list(view.shape)}. Is the adapter for another model?"
        )


def common_dtype(a: View, b: View) -> torch.dtype:
    return torch.promote_types(a.dtype, b.dtype)


def read_pair(a: View, b: View) -> tuple[Tensor, Tensor]:
    """Returns both factors in one dtype."""
    dtype = common_dtype(a, b)
    return a.read().to(dtype), b.read().to(dtype)


def sizes(stacks: Stacks, projection: str) -> tuple[int, int]:
    """Returns the numbers of rows and columns of a projection: "gate", "up", "gate_up" or "down"."""
    if projection == "down":
        return stacks.hidden_size, stacks.intermediate_size
    rows = stacks.first_rows if projection == "gate_up" else stacks.intermediate_size
    return rows, stacks.hidden_size


def stacked_factors(
    a: View, b: View, weight: str, projection: str, settings: LoraSettings, stacks: Stacks
) -> Factors:
    """Returns the factors A [E, r, in] and B [E, out, r] of a projection of all experts."""
    out_features, in_features = sizes(stacks, projection)
    rank = a.shape[1] if a.dim == 3 else 0
    expect(a, (stacks.num_experts, rank, in_features), weight)
    expect(b, (stacks.num_experts, out_features, rank), weight)
    scaling = settings.scaling(weight, rank, str(a))
    load = partial(read_pair, a, b)
    return Factors(rank, out_features, in_features, scaling, common_dtype(a, b), load, stacks.num_experts)
