"""from_pretrained with KTConfig, for every model of transformers with experts, as transformers saves it."""

import pytest
import torch
from every_model import folders, tiny_batch, tiny_model
from model_runs import MODEL_BUDGET
from model_support import NOT_SUPPORTED, WITHOUT_STACKS

import ktops
from ktops.nn import KTExperts
from ktops.testing.budgets import relative_error

pytestmark = pytest.mark.usefixtures("enabled")


REFUSED = {
    **dict.fromkeys(WITHOUT_STACKS, r"its weights are not stacked, so only ktops\.swap_experts replaces it"),
    "longcat_flash": r"must have shape \[8, 32, 24\] to match gate and up of shape \[8, 48, 32\]",
    "diffusion_gemma": r"shares its weights with model\.decoder.*; ktops cannot load shared experts",
}
"""Maps folders to the error that names the reason."""

LOADED = [folder for folder in folders() if folder not in {*NOT_SUPPORTED, *REFUSED}]


def load(model_class: type, path, **options) -> torch.nn.Module:
    model, info = model_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert any(isinstance(module, KTExperts) for module in model.modules())
    return model.eval()


@pytest.mark.parametrize("folder", LOADED)
@torch.no_grad()
def test_logits_equal_eager(folder, tmp_path):
    """Also after the loaded model is saved and loaded again, with the same bits."""
    model, batch = tiny_model(folder).eval(), tiny_batch(folder)
    model.save_pretrained(tmp_path / "dense")
    first = load(type(model), tmp_path / "dense", quantization_config=ktops.KTConfig())
    logits = first(**batch).logits
    assert relative_error(logits, model(**batch).logits) < MODEL_BUDGET
    first.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(type(model), tmp_path / "saved")(**batch).logits, logits)


@pytest.mark.parametrize("folder", sorted(REFUSED))
def test_refused(folder, tmp_path):
    model = tiny_model(folder)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSED[folder]):
        type(model).from_pretrained(tmp_path, quantization_config=ktops.KTConfig())


def test_experts_with_hooks_are_refused(tmp_path):
    """Loading would lose the hooks."""
    model = tiny_model("gpt_oss")
    model.save_pretrained(tmp_path)
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts cannot be replaced: it has hooks"):
        ktops.load_experts(model, tmp_path, show_progress=False)
    assert model.model.layers[1].mlp.experts is experts
