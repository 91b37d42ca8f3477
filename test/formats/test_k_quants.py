"""Writes ggml's k-quants, reads them with the gguf package, and bounds the distance from the weights."""

import gguf
import pytest
import torch
from torch import Tensor

import ktops
from ktops.formats.k_quants import LAYOUTS
from ktops.testing.compare import one_thread
from ktops.testing.weights import HALVES

NAMES = tuple(LAYOUTS)
GROUP = {"q2_k": 16, "q3_k": 16, "q4_k": 32, "q5_k": 32, "q6_k": 16}
CODES = {"q2_k": (0, 3), "q3_k": (-4, 3), "q4_k": (0, 15), "q5_k": (0, 31), "q6_k": (-32, 31)}
MOST = {"q2_k": 15, "q3_k": 31, "q4_k": 63, "q5_k": 63, "q6_k": 127}
"""Largest integers that encode a group's scale."""


@pytest.fixture(autouse=True)
def in_one_thread():
    with one_thread():
        yield


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def awkward() -> Tensor:
    """Returns rows of two blocks: normal, zero, constant, of one sign, with different groups, sparse."""
    rows = normal(9, 512)
    rows[1] = 0
    rows[2], rows[3] = 0.75, -0.75
    rows[4], rows[5] = rows[4].abs() + 3, -rows[5].abs() - 3
    rows[6] *= torch.logspace(-3, 3, 32).repeat_interleave(16)
    rows[7, :300] = 0
    rows[8, torch.arange(512) % 40 > 0] = 0
    return rows[None]


def read(weight: ktops.ExpertWeight) -> Tensor:
    """Returns the weights decoded by the gguf package."""
    return torch.from_numpy(
        gguf.quants.dequantize(weight.weight.numpy(), gguf.GGMLQuantizationType[weight.format.upper()])
    )


def ideal(groups: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Returns the step and offset with which groups [..., group] reach all their weights, in float64."""
    low, high = CODES[name]
    if low < 0:
        step = groups.abs().amax(-1, keepdim=True) / high
        return step, torch.zeros_like(step)
    least, largest = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True)
    return (largest - least) / high, -least


def largest_error(groups: Tensor, name: str) -> Tensor:
    """Bounds the error of weights [..., blocks, groups, group] rounded to nearest.

    The error is half a step, plus what rounding takes from the reach of a group at either end: half a unit of
    the offset, and half a unit of the step times the farthest code. A unit is the largest of the block /
    most, rounded up to a float16, which has 11 bits and ends at 2^-24.
    """
    step, offset = ideal(groups, name)
    units = (x.amax(-2, keepdim=True) / MOST[name] for x in (step, offset))
    step_error, offset_error = ((unit * (1 + 2**-10)).maximum(unit + 2**-24) / 2 for unit in units)
    farthest = max(map(abs, CODES[name]))
    return (step + step_error) / 2 + farthest * step_error + offset_error


def in_groups(rows: Tensor, name: str) -> Tensor:
    return rows.double().unflatten(-1, (-1, 256 // GROUP[name], GROUP[name]))


@pytest.mark.parametrize("size", [1e-7, 3e-4, 1.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_near(name, size):
    rows = awkward() * size
    weight = ktops.quantize(rows, name)
    groups, restored = in_groups(rows, name), in_groups(read(weight), name)
    assert bool(((restored - groups).abs() <= largest_error(groups, name) * (1 + 1e-6)).all())
    assert torch.equal(restored[:, 1], torch.zeros_like(restored[:, 1]))
    assert torch.equal(ktops.dequantize(weight, torch.float32), read(weight))


@pytest.mark.parametrize("name", NAMES)
def test_error_of_normal_weights(name):
    """The error is that of unrounded scales, except that those would represent a group's ends exactly."""
    rows = normal(1, 64, 1024)
    groups = in_groups(rows, name)
    step, offset = ideal(groups, name)
    unrounded = ((groups + offset) / step).round() * step - offset
    ends = 1 if CODES[name][0] < 0 else 2
    allowed = (unrounded - groups).norm() * (GROUP[name] / (GROUP[name] - ends)) ** 0.5
    assert (read(ktops.quantize(rows, name)) - rows).norm() <= allowed


def least_error(groups: Tensor, d: Tensor, dmin: Tensor, name: str) -> Tensor:
    """Returns the sum over groups [n, group] of the least squared error of all integer scales and minima."""
    low, high = CODES[name]
    most = MOST[name]
    scales = torch.arange(-most if low < 0 else 0, most + 1).view(-1, 1, 1)
    least = torch.full((len(groups), 1), torch.inf, dtype=torch.float64)
    for minimum in range(1 if low < 0 else most + 1):
        step, offset = d * scales, dmin * minimum
        codes = torch.where(step == 0, 0, (groups + offset) / step).round().clamp(low, high)
        errors = (codes * step - offset - groups).square().sum(-1, keepdim=True)
        least = torch.minimum(least, errors.amin(0))
    return least.sum()


@pytest.mark.parametrize("name", NAMES)
def test_mse(name):
    """The result is never worse than rtn, and nearly the best possible for its d and dmin."""
    few = normal(1, 300, 512) * (normal(300, 512).sin() > 0.95)
    rows = torch.cat([awkward(), few], dim=1)
    rtn, mse = (ktops.quantize(rows, name, method=method) for method in ("rtn", "mse"))
    groups = in_groups(rows, name)
    errors, before = ((in_groups(read(w), name) - groups).square().sum((-2, -1)) for w in (mse, rtn))
    assert bool((errors <= before * (1 + 1e-6)).all())
    block = mse.weight[0, 0].view(2, -1)[0]
    units = [block[place : place + 2].view(torch.float16).double() for place in HALVES[name]]
    best = least_error(groups[0, 0, 0], units[0], units[-1], name)
    assert errors[0, 0, 0] <= min(1.06 * best, 0.9 * before[0, 0, 0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1e9, 3e38, torch.inf, torch.nan])
def test_weights_beyond_the_scales(name, value):
    rows = torch.ones(1, 2, 256)
    rows[0, 1, 3] = value
    with pytest.raises(ValueError, match=f"format '{name}' needs finite weights"):
        ktops.quantize(rows, name, method="mse")


@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_do_not_depend_on_their_neighbors(name, method):
    """Blocks do not depend on how the weights are split for quantization either."""
    rows = normal(1, 300, 512)
    whole = ktops.quantize(rows, name, method=method)
    assert torch.equal(ktops.quantize(rows[:, 290:], name, method=method).weight, whole.weight[:, 290:])
