"""PEFT on experts whose weights are transposed or interleaved, without a gate, or followed by a norm."""

import peft
import pytest
import torch
from every_model import tiny_batch, tiny_model
from every_model_runs import through_ktops, with_adapters
from model_runs import MODEL_BUDGET
from safetensors.torch import load_file

from ktops.testing.budgets import relative_error

pytestmark = pytest.mark.usefixtures("enabled")


@pytest.fixture(params=["gpt_oss", "openai_privacy_filter", "aria", "nemotron_h", "muse_spark", "llama4"])
def folder(request) -> str:
    return request.param


def adapted(folder: str) -> peft.PeftModel:
    """Returns a model in evaluation mode with two random adapters; "default" is active."""
    return with_adapters(folder, adapters=("default", "second"), seed=3).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, folder: str) -> torch.Tensor:
    return model(**tiny_batch(folder)).logits


def two_at_once(model: peft.PeftModel) -> None:
    model.base_model.set_adapter(["default", "second"])


def merged(model: peft.PeftModel) -> None:
    model.merge_adapter()


def merged_and_unmerged(model: peft.PeftModel) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def without(model: peft.PeftModel) -> None:
    model.base_model.disable_adapter_layers()


CHANGES = [lambda model: None, two_at_once, merged, merged_and_unmerged, without]


def test_equals_plain_peft(folder):
    """After each change, logits are those of plain PEFT; changes that should matter do."""
    found = []
    for change in CHANGES:
        plain, model = adapted(folder), through_ktops(folder, adapted(folder))
        change(plain)
        change(model)
        expected = logits(plain, folder)
        assert relative_error(logits(model, folder), expected) < MODEL_BUDGET, change.__name__
        found.append(expected)
    one, two, merged_one, again, base = found
    assert relative_error(merged_one, one) < MODEL_BUDGET and relative_error(again, one) < MODEL_BUDGET
    assert min(relative_error(two, one), relative_error(base, one)) > 100 * MODEL_BUDGET


def test_merged_parameters_are_those_of_plain_peft(folder):
    plain, model = adapted(folder), through_ktops(folder, adapted(folder))
    expected = plain.merge_and_unload().state_dict()
    actual = model.merge_and_unload().state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())


def test_files_are_those_of_plain_peft(folder, tmp_path):
    model = through_ktops(folder, adapted(folder))
    model.save_pretrained(tmp_path / "ktops", selected_adapters=["default"])
    adapted(folder).save_pretrained(tmp_path / "plain", selected_adapters=["default"])
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ktops", "plain")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())
    loaded = peft.PeftModel.from_pretrained(tiny_model(folder).eval(), tmp_path / "ktops")
    assert relative_error(logits(loaded, folder), logits(model, folder)) < MODEL_BUDGET
