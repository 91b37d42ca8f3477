"""Compares every model with experts in the installed transformers with its eager implementation."""

import re
import statistics
import warnings
from pathlib import Path

import pytest
import torch
from every_model import LIMIT, folders, tiny_batch, tiny_model
from model_runs import MODEL_BUDGET, CountOps, Run, assert_close
from model_support import LIMITED, NOT_SUPPORTED, SWAPPED, support_table

import ktops
from ktops.testing.budgets import forward_budget, relative_error, safety

pytestmark = pytest.mark.usefixtures("enabled")

FOLDERS = folders()
SUPPORTED = [folder for folder in FOLDERS if folder not in NOT_SUPPORTED]


def through_ktops(folder: str, model: torch.nn.Module) -> torch.nn.Module:
    if folder in SWAPPED:
        assert ktops.swap_experts(model)
    else:
        model.set_experts_implementation("ktops")
    return model


def step(model: torch.nn.Module, folder: str) -> Run:
    """Runs forward and backward; parameters that the batch does not reach have no gradient.

    Nor does NLLB-MoE's bias of the keys of attention, which the softmax cancels; what is left is rounding.
    """
    with CountOps() as ops:
        output = model(**tiny_batch(folder))
        loss = getattr(output, "loss", None)
        if loss is None:
            loss = output.logits.square().mean()
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    if folder == "nllb_moe":
        gradients = {name: grad for name, grad in gradients.items() if not name.endswith("k_proj.bias")}
    aux_loss = getattr(output, "aux_loss", None)
    return Run(output.logits.detach(), loss.detach(), aux_loss, gradients, ops.counts)


@pytest.mark.parametrize("folder", SUPPORTED)
def test_training_step_equals_eager(folder):
    """Compares logits, loss, auxiliary loss and the gradient of every parameter in float32."""
    eager = step(tiny_model(folder), folder)
    others = []
    for implementation in () if folder in SWAPPED else ("grouped_mm", "batched_mm"):
        model = tiny_model(folder)
        model.set_experts_implementation(implementation)
        others.append(step(model, folder))
    exact = step(tiny_model(folder, torch.float64), folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ktops")
        actual = step(through_ktops(folder, tiny_model(folder)), folder)
    assert actual.ops["moe_sft_fwd"] >= actual.ops["moe_sft_bwd"] > 0
    assert not eager.ops
    assert_close(actual, eager, exact, *others)


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
