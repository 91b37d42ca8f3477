"""Compares every model with experts in the installed transformers with its eager implementation."""

import re
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from every_model import LIMIT, folders, tiny_batch, tiny_model, weighs_router_loss
from every_model_runs import step, through_ktops, with_adapters
from model_runs import MODEL_BUDGET, Run, assert_as_close_as_any
from model_support import (
    LIMITED,
    NOT_SUPPORTED,
    SWAPPED,
    WITHOUT_ROUTER_LOSS,
    WITHOUT_STACKS,
    support_table,
)

from ktops.testing.budgets import forward_budget, relative_error, safety

pytestmark = pytest.mark.usefixtures("enabled")

FOLDERS = folders()
SUPPORTED = [folder for folder in FOLDERS if folder not in NOT_SUPPORTED]


def other_runs(folder: str, make_model: Callable[[str], torch.nn.Module]) -> list[Run]:
    """Runs the other implementations of transformers, if the model has them."""
    runs = []
    for implementation in () if folder in SWAPPED else ("grouped_mm", "batched_mm"):
        model = make_model(folder)
        getattr(model, "base_model", model).set_experts_implementation(implementation)
        runs.append(step(model, folder))
    return runs


@pytest.mark.parametrize("folder", SUPPORTED)
def test_training_step_equals_eager(folder):
    """Compares logits, loss, auxiliary loss and the gradient of every parameter in float32."""
    eager = step(tiny_model(folder), folder)
    exact = step(tiny_model(folder, torch.float64), folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ktops")
        actual = step(through_ktops(folder, tiny_model(folder)), folder)
    assert actual.ops["moe_sft_fwd"] >= actual.ops["moe_sft_bwd"] > 0
    assert not eager.ops
    if weighs_router_loss(folder) and folder not in WITHOUT_ROUTER_LOSS:
        assert eager.aux_loss is not None
    assert_as_close_as_any(actual, eager, exact, lambda: other_runs(folder, tiny_model))


@pytest.mark.parametrize("folder", SUPPORTED)
def test_bfloat16_equals_eager(folder):
    """The loss and the logits of most tokens are as close to float64 as eager's, on the same rounded weights.

    A token whose experts differ between bfloat16 and float64 has other logits with any implementation.
    """
    eager = step(tiny_model(folder, torch.bfloat16), folder)
    exact = step(tiny_model(folder, torch.float64, rounded_to=torch.bfloat16), folder)
    actual = step(through_ktops(folder, tiny_model(folder, torch.bfloat16)), folder)
    added = forward_budget(torch.bfloat16)
    allowed = safety(1) * relative_error(eager.loss, exact.loss) + added
    assert relative_error(actual.loss, exact.loss) <= allowed
    error, usual = (_median_error(run.logits, exact.logits) for run in (actual, eager))
    assert error <= safety(exact.logits.shape[-1]) * usual + added


def _median_error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    rows = zip(logits.flatten(0, -2), exact.flatten(0, -2), strict=True)
    return statistics.median(relative_error(*row) for row in rows)


@pytest.mark.parametrize("folder", [f for f in SUPPORTED if f not in WITHOUT_STACKS])
def test_lora_on_the_experts_equals_plain_peft(folder, monkeypatch):
    """Compares logits, loss and the gradients of the factors in float32; PEFT makes no dense delta."""
    eager = step(with_adapters(folder), folder)
    exact = step(with_adapters(folder, torch.float64), folder)
    model = through_ktops(folder, with_adapters(folder))
    with monkeypatch.context() as patch:
        patch.delattr(peft.tuners.lora.layer.ParamWrapper, "_activate_lora")
        actual = step(model, folder)
    assert actual.ops["moe_sft_bwd"] > 0 and actual.gradients
    assert_as_close_as_any(actual, eager, exact, lambda: other_runs(folder, with_adapters))


@torch.no_grad()
def test_limits_act():
    """The experts of these models, and of no others, clamp or cap their projections, and do in the tests."""
    limited = set()
    for folder in set(FOLDERS) - {"vitpose_backbone"}:
        model, batch = tiny_model(folder).eval(), tiny_batch(folder)
        logits = model(**batch).logits
        found = [_unlimit(name, module) for name, module in model.named_modules()]
        if any(found):
            limited.add(folder)
            assert relative_error(model(**batch).logits, logits) > 100 * MODEL_BUDGET, folder
    assert limited == LIMITED


def _unlimit(name: str, module: torch.nn.Module) -> bool:
    """Removes the limits of an experts module; returns whether it had any."""
    caps = ("softcap",) if name.endswith(("experts.act_fn.gate_softcap", "experts.act_fn.up_softcap")) else ()
    limits = ("limit", "swiglu_limit") if re.search(r"(?<!shared_)experts$", name) else ()
    found = [key for key in (*caps, *limits) if getattr(module, key, None) == LIMIT]
    for key in found:
        setattr(module, key, 1e4)
    return bool(found)


@pytest.mark.parametrize("folder", NOT_SUPPORTED)
def test_models_that_are_not_supported(folder):
    """Each is in transformers, and the op does not run in it."""
    assert folder in FOLDERS
    if folder == "vitpose_backbone":
        return
    model = tiny_model(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_experts_implementation("ktops")
        assert not step(model, folder).ops


def test_docs_list_every_model():
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    assert re.search(r"<!-- models -->\n(.*)\n<!-- end -->", page, re.DOTALL)[1] == support_table(FOLDERS)
