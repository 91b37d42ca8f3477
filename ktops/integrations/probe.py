"""Tests on random rows whether the op computes the same as an experts module that it would replace."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ktops.nn.expert_list import KTExpert, KTExpertList
from ktops.nn.experts import KTExperts

_SCALES = (0.1, 1.0, 10.0, 100.0)
"""Rows of very different magnitude; the large ones reveal a clamped activation."""

_ROUNDINGS = 12
"""Roundings in a result of 16 bits: the products and biases of gate, up and down (6), the activation,
act(g) u, the routing weight, the sum of two experts (2), and the op's own rounding. Sums of products run in
float32."""

_LONGEST_SUM = 1 << 14
"""In wider dtypes the sums are rounded, once per term of the longest fan-in."""


def _tolerance(dtype: torch.dtype) -> float:
    """Returns the relative error of a row if all roundings add up; a different formula errs by about 1."""
    return (_ROUNDINGS if dtype.itemsize == 2 else _LONGEST_SUM) * torch.finfo(dtype).eps / 2


def disagreement_of_experts(module: nn.Module, experts: KTExperts) -> str | None:
    """Returns why ``experts`` cannot replace ``module``, None if their results agree."""
    rows = _rows(experts.hidden_size, experts.down_proj.dtype)
    top_k = min(2, experts.num_experts)
    ids = torch.arange(len(rows) * top_k).reshape(len(rows), top_k) % experts.num_experts
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)).to(rows.dtype)
    return _disagreement(module, experts, rows, ids, weights)


def disagreement_of_expert(module: nn.Module, expert: KTExpert) -> str | None:
    """Returns why ``expert`` cannot replace ``module``, testing a float32 copy with random weights.

    The modules may be on any device, and the default device need not be the CPU.
    """
    with torch.device("cpu"):
        return _disagreement_of_expert(module, expert)


def _disagreement_of_expert(module: nn.Module, expert: KTExpert) -> str | None:
    module, expert = copy.deepcopy((module, expert))
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device="cpu")
    module.to("cpu").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            size = parameter.shape[-1] ** -0.5
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    KTExpertList([expert])  # makes its weights slices of stacked ones
    first = expert.projections()[0]
    rows = _rows(first.in_features, first.weight.dtype)
    difference = _disagreement(module.train(), expert.train().call_projections, rows)
    return difference or _disagreement(module.eval(), expert.eval(), rows)


def _rows(hidden_size: int, dtype: torch.dtype) -> Tensor:
    rows = torch.randn(len(_SCALES), hidden_size, generator=torch.Generator().manual_seed(0))
    return (rows * torch.tensor(_SCALES)[:, None]).to(dtype)


@torch.no_grad()
def _disagreement(
    module: nn.Module, replacement: Callable[..., Tensor], rows: Tensor, *routes: Tensor
) -> str | None:
    try:
        expected = _seeded(module, rows.clone(), *routes)
    except Exception as error:
        return f"it cannot be called as {'experts(x, ids, weights)' if routes else 'expert(x)'}: {error}"
    if not isinstance(expected, Tensor) or expected.shape != rows.shape:
        return "it does not return a single tensor with the shape of its input"
    expected, actual = expected.double(), _seeded(replacement, rows, *routes).double()
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    if rows.dtype == torch.float16:  # large rows may overflow
        errors = errors[expected.isfinite().all(-1)]
    # NaN too: rows of zeros prove nothing
    if not len(errors) or not bool((errors < _tolerance(rows.dtype)).all()):
        return f"it computes something else, with relative errors {errors.tolist()} on random rows"
    return None


def _seeded(module: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Calls a module such that a dropout drops the same elements in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module(*args)
