"""Runs one training step of a model, records its operators, and compares it with the eager model."""

import copy
import functools
import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ktops.testing.budgets import gradient_budget, model_budget, relative_error, safety

MIN_COSINE = 0.999

MODEL_BUDGET = model_budget(torch.float32, inner_size=40, num_operations=60)
"""Allowed relative difference of two float32 runs of a tiny model."""

CANCELLED = 1e-12
"""A float64 gradient whose norm is a smaller fraction of the largest is rounding."""


class CountOps(TorchDispatchMode):
    """Counts the kt operators that run inside the ``with`` block: ``{"moe_sft_fwd": 2, ...}``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kt":
            self.counts[func._schema.name.removeprefix("kt::")] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Run:
    """The results of one step, and the kt operators that it ran."""

    logits: Tensor
    loss: Tensor
    aux_loss: Tensor | None
    gradients: dict[str, Tensor]
    ops: Counter


def step(model: torch.nn.Module, batch: dict[str, Tensor] | None = None, count: bool = True) -> Run:
    """Runs forward and backward; takes the model's gradients and clears them.

    torch.compile does not run under a dispatch mode, so pass count=False for compiled models.
    """
    model.zero_grad()
    ops = CountOps()
    with ops if count else nullcontext():
        output = model(**(tiny_batch() if batch is None else batch))
        output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    aux_loss = getattr(output, "aux_loss", None)
    return Run(output.logits.detach(), output.loss.detach(), aux_loss, gradients, ops.counts)


def storage_changes(load: Callable[..., nn.Module]) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Returns what gives the parameters of a model other storage; load(model, assign=...) loads a state."""
    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "double": lambda model: model.double().float(),
        "load": lambda model: load(model, assign=False),
        "assign": lambda model: load(model, assign=True),
    }


def experts_modules(model: torch.nn.Module) -> list[str]:
    """Returns the names of the experts modules of a tiny model."""
    return [name for name, _ in model.named_modules() if name.endswith(".experts")]


def assert_close(actual: Run, eager: Run, exact: Run, *others: Run) -> None:
    """Asserts that ``actual`` is as close to float64 as eager and the op's budget allow, in direction too.

    ``others`` are further runs; the one with the largest error counts, since that of a result with a few
    elements is a matter of chance. Where the exact gradient cancels, as the softmax cancels that of a bias of
    keys, the gradient has to be as small as roundings of the others.
    """
    dtype = actual.logits.dtype
    added = gradient_budget(dtype, inner_size=40)
    runs = (actual, exact, eager, *others)
    assert actual.gradients.keys() == eager.gradients.keys() == exact.gradients.keys()
    norms = {name: gradient.norm().item() for name, gradient in exact.gradients.items()}
    largest = max(norms.values(), default=0.0)
    cancelled = {name for name, norm in norms.items() if norm < CANCELLED * largest}
    for name in cancelled:
        norm = actual.gradients[name].norm().item()
        assert norm < model_budget(dtype, 40, 60) * largest, f"{name}: {norm:.2e} instead of 0"
    results = {name: [run.gradients[name] for run in runs] for name in norms if name not in cancelled}
    results |= {name: [getattr(run, name) for run in runs] for name in ("logits", "loss")}
    if exact.aux_loss is not None:
        results["aux_loss"] = [run.aux_loss for run in runs]
    for name, (value, exact_value, *transformers) in results.items():
        assert value is not None, f"no {name}"
        error, usual = (
            relative_error(value, exact_value),
            max(relative_error(x, exact_value) for x in transformers),
        )
        allowed = safety(exact_value.numel()) * usual
        assert error <= allowed + added, f"{name}: error {error:.2e}, allowed {allowed + added:.2e}"
        if dtype == torch.float32:
            cosine = torch.nn.functional.cosine_similarity(value.double().ravel(), exact_value.ravel(), dim=0)
            assert cosine > MIN_COSINE, f"{name}: cosine {cosine:.5f}"


def assert_as_close_as_any(actual: Run, eager: Run, exact: Run, others: Callable[[], list[Run]]) -> None:
    """``assert_close`` with further runs, made only if the errors of eager do not suffice."""
    try:
        assert_close(actual, eager, exact)
    except AssertionError:
        assert_close(actual, eager, exact, *others())


def first_stable_seed(models: Callable[[int], Iterable[torch.nn.Module]]) -> int:
    """Returns the first seed whose models all route every token to the same experts.

    A token whose experts differ between bfloat16 and float64 has a different loss and different gradients,
    with any implementation.
    """
    for seed in range(50):
        routes = [_routes(model) for model in models(seed)]
        if all(torch.equal(a, b) for route in routes for a, b in zip(route, routes[0], strict=True)):
            return seed
    raise AssertionError("no stable seed")


@functools.cache
def stable_seed(architecture: str) -> int:
    """Returns the seed for the model in bfloat16 with two implementations, and in float64."""

    def models(seed):
        model = tiny_model(architecture, dtype=torch.bfloat16, seed=seed)
        for implementation in ("eager", "grouped_mm"):
            model.set_experts_implementation(implementation)
            yield model
        model.set_experts_implementation("eager")
        yield model.double()

    return first_stable_seed(models)


@torch.no_grad()
def _routes(model: torch.nn.Module) -> list[Tensor]:
    """Returns the sorted top_k_index of every layer."""
    found = []
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(lambda _, args: found.append(args[1].sort(dim=-1).values))
        for name in experts_modules(model)
    ]
    model(input_ids=tiny_batch()["input_ids"])
    for handle in handles:
        handle.remove()
    return found
