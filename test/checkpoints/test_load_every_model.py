"""from_pretrained with KTConfig, for every model of transformers with experts, as transformers saves it."""

import pytest
import torch
from every_model import folders, tiny_batch, tiny_model
from model_runs import MODEL_BUDGET
from model_support import NOT_SUPPORTED

import ktops
from ktops.nn import KTExperts
from ktops.testing.budgets import relative_error

pytestmark = pytest.mark.usefixtures("enabled")


REFUSED = {
    "diffusion_gemma": r"shares its weights with model\.decoder.*; ktops cannot load shared experts",
}
"""Maps folders to the error that names the reason."""

LOADED = [folder for folder in folders() if folder not in {*NOT_SUPPORTED, *REFUSED}]


@pytest.mark.parametrize("folder", LOADED)
@torch.no_grad()
def test_logits_equal_eager(folder, tmp_path):
    model = tiny_model(folder).eval()
    model.save_pretrained(tmp_path)
    batch = tiny_batch(folder)
    loaded, info = type(model).from_pretrained(
        tmp_path, quantization_config=ktops.KTConfig(), dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert any(isinstance(module, KTExperts) for module in loaded.modules())
    expected = model(**batch).logits
    assert relative_error(loaded.eval()(**batch).logits, expected) < MODEL_BUDGET


@pytest.mark.parametrize("folder", REFUSED)
def test_refused(folder, tmp_path):
    model = tiny_model(folder)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSED[folder]):
        type(model).from_pretrained(tmp_path, quantization_config=ktops.KTConfig())
