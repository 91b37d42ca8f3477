"""Compares every model with experts in the installed transformers with its eager implementation."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from every_model import LIMIT, folders, tiny_batch, tiny_model
from model_runs import MODEL_BUDGET, CountOps, Run, assert_close
from model_support import NOT_SUPPORTED, SWAPPED, support_table

import ktops
from ktops.testing.budgets import SAFETY, forward_budget, relative_error

pytestmark = pytest.mark.usefixtures("enabled")

FOLDERS = folders()
SUPPORTED = [folder for folder in FOLDERS if folder not in NOT_SUPPORTED]
LIMITS = {"swiglu_limit", "swiglu_limits", "mlp_gate_softcap", "mlp_up_softcap"}


def through_ktops(folder: str, model: torch.nn.Module) -> torch.nn.Module:
    if folder in SWAPPED:
        assert ktops.swap_experts(model)
    else:
        model.set_experts_implementation("ktops")
    return model


def step(model: torch.nn.Module, folder: str) -> Run:
    """Runs forward and backward; parameters that the batch does not reach have no gradient."""
    with CountOps() as ops:
        output = model(**tiny_batch(folder))
        loss = getattr(output, "loss", None)
        if loss is None:
            loss = output.logits.square().mean()
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    aux_loss = getattr(output, "aux_loss", None)
    return Run(output.logits.detach(), loss.detach(), aux_loss, gradients, ops.counts)


@pytest.mark.parametrize("folder", SUPPORTED)
def test_training_step_equals_eager(folder):
    """Compares logits, loss, auxiliary loss and the gradient of every parameter in float32."""
    eager = step(tiny_model(folder), folder)
    exact = step(tiny_model(folder).double(), folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ktops")
        actual = step(through_ktops(folder, tiny_model(folder)), folder)
    assert actual.ops["moe_sft_fwd"] == actual.ops["moe_sft_bwd"] > 0
    assert not eager.ops
    assert_close(actual, eager, exact)


@pytest.mark.parametrize("folder", SUPPORTED)
def test_loss_in_bfloat16_equals_eager(folder):
    """The loss is as close to float64 on the same rounded weights as eager's."""
    eager = step(tiny_model(folder).bfloat16(), folder)
    exact = step(tiny_model(folder).bfloat16().double(), folder)
    actual = step(through_ktops(folder, tiny_model(folder).bfloat16()), folder)
    allowed = SAFETY * relative_error(eager.loss, exact.loss) + forward_budget(torch.bfloat16)
    assert relative_error(actual.loss, exact.loss) <= allowed


@pytest.mark.parametrize("folder", FOLDERS)
def test_limits_act(folder):
    """The comparisons above reach the clamps and caps of the experts."""
    if folder == "vitpose_backbone":
        assert folder in NOT_SUPPORTED  # it has no logits
        return
    model = tiny_model(folder)
    limited = LIMITS & vars(model.config.get_text_config()).keys()
    with torch.no_grad():
        logits = model(**tiny_batch(folder)).logits
        for module in model.modules():
            if "Shared" not in type(module).__name__:
                for name in ("limit", "swiglu_limit", "softcap"):
                    if isinstance(getattr(module, name, None), float):
                        assert getattr(module, name) in (LIMIT, float("inf"))
                        setattr(module, name, 1e4)
        change = relative_error(model(**tiny_batch(folder)).logits, logits)
    assert (change > 100 * MODEL_BUDGET) == bool(limited)


@pytest.mark.parametrize("folder", NOT_SUPPORTED)
def test_models_that_are_not_supported(folder):
    """Each is in transformers, and the op does not run in it."""
    assert folder in FOLDERS
    if folder == "vitpose_backbone":
        return
    model = tiny_model(folder)
    model.set_experts_implementation("ktops")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not step(model, folder).ops


def test_docs_list_every_model():
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    assert re.search(r"<!-- models -->\n(.*)\n<!-- end -->", page, re.DOTALL)[1] == support_table(FOLDERS)
