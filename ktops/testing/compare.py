"""Runs ktops.moe_sft and its reference on the same inputs, and compares the results."""

import ctypes
import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

import ktops
from ktops import ExpertWeight, reference
from ktops.ops.arguments import GRADIENTS
from ktops.testing.budgets import relative_error, rms, rounding_level, safety, smallest_error
from ktops.testing.inputs import densified, floating, op_arguments, require_grad, upcast


def random_grad_output(inputs: dict, seed: int = 1) -> Tensor:
    """Returns an N(0, 1) gradient for the output of ktops.moe_sft(**inputs)."""
    hidden_states = inputs["hidden_states"]
    shape = hidden_states.shape
    if not inputs.get("reduce", True):
        shape = (*inputs["topk_ids"].shape, shape[1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(hidden_states.dtype)


def run(
    inputs: dict, grad_output: Tensor, names: tuple[str, ...] | None = None, **options
) -> dict[str, Tensor]:
    """Runs ktops.moe_sft; returns {"output": ..., "hidden_states": its gradient, ...}.

    Gradients are those of the named tensors (None: all). ``options`` are save and compute.
    """
    names = floating(inputs) if names is None else names
    inputs = require_grad(inputs, *names)
    output = ktops.moe_sft(**inputs, **options)
    gradients = torch.autograd.grad(output, [inputs[name] for name in names], grad_output)
    return {"output": output.detach()} | dict(zip(names, gradients, strict=True))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Makes torch use ``count`` threads inside the ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """Makes torch use only the calling thread, because small operators would wait longer than they work."""
    with threads(1):
        yield


@one_thread()
def run_reference(
    inputs: dict, grad_output: Tensor, names: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Returns what :func:`run` returns, computed by ktops.reference in float64."""
    names = floating(inputs) if names is None else names
    arguments = op_arguments(upcast(densified(inputs)))
    output, gate_up, xa, ha = reference.moe_sft_fwd(arguments, "activations")
    mask = sum(1 << GRADIENTS.index(name) for name in names)
    gradients = reference.moe_sft_bwd(grad_output.double(), arguments, "activations", gate_up, xa, ha, mask)
    named = {name: grad for name, grad in zip(GRADIENTS, gradients, strict=True) if grad is not None}
    return {"output": output} | {name: named[name] for name in names}


def inner_size(inputs: dict) -> int:
    """Returns the length of the longest sum in forward or backward: over H, 2I or the routes."""
    return max(
        inputs["hidden_states"].shape[1], 2 * inputs["down_proj"].shape[-1], inputs["topk_ids"].numel()
    )


class Movement(NamedTuple):
    """How far a result moves: the norm, the largest element, and how many elements make up the norm."""

    norm: float
    largest: float
    num_elements: float

    @classmethod
    def of(cls, squares: Tensor) -> "Movement":
        """Computes the movement from the mean squares of the elements' movements."""
        total, fourth = squares.sum().item(), squares.square().sum().item()
        largest = squares.max().item() if squares.numel() else 0.0
        return cls(total**0.5, largest**0.5, total**2 / fourth if fourth else 1.0)


@one_thread()
def sensitivity(inputs: dict, grad_output: Tensor, expected: dict[str, Tensor]) -> dict[str, Movement]:
    """Measures how far each result moves when every element of every input is perturbed by rounding_level.

    The results of a backward-stable computation are about as far from the exact ones. Ill-conditioned cases
    (a sum that cancels) are allowed the error that is due to their condition, and no more.
    """
    level = rounding_level(inputs["hidden_states"].dtype, inner_size(inputs))
    names = tuple(name for name in expected if name != "output")
    samples = 16 if expected["output"].numel() < 256 else 4
    generator = torch.Generator().manual_seed(2)

    def perturbed(x: Tensor) -> Tensor:
        noise = torch.randn(samples, *x.shape, generator=generator, dtype=torch.float64)
        return x.detach().double() * (1 + level * noise)

    def results(moved: dict[str, Tensor], moved_grad_output: Tensor) -> dict[str, Tensor]:
        return run_reference(inputs | moved, moved_grad_output, names)

    inputs = densified(inputs)
    moved = {name: perturbed(inputs[name]) for name in floating(inputs)}
    values = torch.func.vmap(results)(moved, perturbed(grad_output))
    return {name: Movement.of((value - expected[name]).square().mean(0)) for name, value in values.items()}


def _digest(*values) -> bytes:
    """Returns a digest of the values: tensors by dtype, shape and bytes, mappings with their names."""
    digest = hashlib.blake2b()
    for value in values:
        if isinstance(value, dict):
            value = _digest(*(part for item in sorted(value.items()) for part in item))
        elif isinstance(value, ExpertWeight):
            value = _digest(value.format, value.group_size, *value.codes)
        elif isinstance(value, Tensor):
            dense = value.detach().contiguous()
            digest.update(repr((dense.dtype, dense.shape)).encode())
            value = ctypes.string_at(dense.data_ptr(), dense.nbytes) if dense.nbytes else b""
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
        digest.update(b"\0")
    return digest.digest()


_MOST_REMEMBERED = 256
_remembered: OrderedDict[bytes, tuple[dict[str, Tensor], dict[str, Movement]]] = OrderedDict()


def expectation(
    inputs: dict, grad_output: Tensor, names: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Movement]]:
    """Returns (:func:`run_reference`, :func:`sensitivity`), cached because all kernels need the same."""
    key = _digest(inputs, grad_output, names)
    if key not in _remembered:
        expected = run_reference(inputs, grad_output, names)
        _remembered[key] = expected, sensitivity(inputs, grad_output, expected)
        if len(_remembered) > _MOST_REMEMBERED:
            _remembered.popitem(last=False)
    _remembered.move_to_end(key)
    return _remembered[key]


def _assert_close(what: str, actual: Tensor, expected: Tensor, move: Movement, num_errors: int):
    allowed = safety(min(num_errors, move.num_elements))
    rounding, smallest = rms(actual.dtype), smallest_error(actual.dtype)
    difference = (actual.double() - expected).abs()
    error = difference.norm().item()
    usual = math.hypot(move.norm, rounding * expected.norm().item(), smallest * actual.numel() ** 0.5)
    assert error <= allowed * usual, (
        f"{what}: relative error {relative_error(actual, expected):.3e}, which is "
        f"{error / usual if usual else math.inf:.2f} times the expected one; {allowed:.2f} times is allowed"
    )
    if actual.numel():
        position = int(difference.argmax())
        bound = 2 * allowed * (move.largest + rounding * expected.abs().max().item() + smallest)
        assert difference.max().item() <= bound, (
            f"{what}: element {position} is {actual.flatten()[position]} instead of "
            f"{expected.flatten()[position]}, a difference of {bound:.3e} is allowed"
        )


def assert_matches_reference(actual: dict[str, Tensor], inputs: dict, grad_output: Tensor) -> None:
    """Asserts that the results of :func:`run` are within the budget around the float64 reference.

    Also checks shapes and dtypes; each gradient must have the dtype of its tensor.
    """
    names = tuple(name for name in actual if name != "output")
    expected, moves = expectation(inputs, grad_output, names)
    num_errors = inputs["topk_ids"].numel() * min(inputs["down_proj"].shape[1:])
    for name, exact in expected.items():
        what = "output" if name == "output" else f"gradient of {name}"
        like = inputs["hidden_states" if name == "output" else name]
        assert actual[name].dtype == like.dtype, f"{what}: {actual[name].dtype} instead of {like.dtype}"
        assert actual[name].shape == exact.shape, f"{what}: shape {list(actual[name].shape)}"
        _assert_close(what, actual[name], exact, moves[name], num_errors)


def check_against_reference(inputs: dict, *, save: str = "activations") -> None:
    """Asserts that ktops.moe_sft matches the reference, forward and backward for every floating input."""
    grad_output = random_grad_output(inputs)
    actual = run(inputs, grad_output, save=save)
    assert_matches_reference(actual, inputs, grad_output)
