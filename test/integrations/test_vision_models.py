"""Compares vision-language models with experts with their eager implementation, on an image."""

import copy
import warnings

import pytest
import torch
from every_model_runs import step, through_ktops
from model_runs import MODEL_BUDGET, Run, assert_as_close_as_any
from model_support import NOT_SUPPORTED, WITHOUT_ROUTER_LOSS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from vision_models import image_batch, vision_model, vision_model_folders

from ktops.testing.budgets import relative_error, rounding_level

pytestmark = pytest.mark.usefixtures("enabled")

FOLDERS = {name: folder for name, folder in vision_model_folders().items() if folder not in NOT_SUPPORTED}


@pytest.fixture(autouse=True)
def llama4_output(monkeypatch):
    """Llama-4 of transformers 5.24 reads this from the output of its text model, which does not have it."""
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)


def test_models_with_the_text_model_of_another_folder_are_found():
    assert FOLDERS["kimi_k25"] == "deepseek_v3"


def perturbed_run(model: torch.nn.Module, folder: str, batch: dict[str, torch.Tensor], seed: int) -> Run:
    """Runs a float64 model with parameters as far off as the roundings of float32 move its results."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    level = rounding_level(torch.float32, inner_size=40)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(1 + level * noise)
    return step(model, folder, batch)


@pytest.mark.parametrize("model_type", FOLDERS)
def test_training_step_on_an_image_equals_eager(model_type):
    """Compares logits, loss, auxiliary loss and all gradients, those of the vision tower too, in float32.

    An error of the text model reaches the vision tower through the few tokens of the image. Two perturbed
    runs measure by how much.
    """
    folder = FOLDERS[model_type]
    model = vision_model(model_type)
    batch = image_batch(model)
    eager = step(model, folder, batch)
    model = through_ktops(folder, vision_model(model_type))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ktops")
        actual = step(model, folder, batch)
    assert actual.ops["moe_sft_fwd"] >= actual.ops["moe_sft_bwd"] > 0
    assert not eager.ops
    if hasattr(model.config.get_text_config(), "router_aux_loss_coef") and folder not in WITHOUT_ROUTER_LOSS:
        assert eager.aux_loss is not None
    model = vision_model(model_type, torch.float64)
    batch = image_batch(model)
    exact = step(model, folder, batch)
    assert_as_close_as_any(
        actual, eager, exact, lambda: [perturbed_run(model, folder, batch, seed) for seed in range(2)]
    )


class ExpertInputs(TorchDispatchMode):
    """Records the hidden states that the experts are applied to, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_states: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kt":
            self.hidden_states.append(args[0].clone())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", FOLDERS)
@torch.no_grad()
def test_image_reaches_the_experts(model_type):
    """Another image changes the experts' inputs and the logits of its own text, and no others."""
    model = vision_model(model_type)
    batches = [image_batch(model, seed) for seed in range(2)]
    through_ktops(FOLDERS[model_type], model)
    logits, inputs = [], []
    for batch in batches:
        with ExpertInputs() as experts:
            logits.append(model(**batch).logits)
        inputs.append(experts.hidden_states)
    changed, same = (relative_error(new, old) for new, old in zip(*logits, strict=True))
    assert changed > 100 * MODEL_BUDGET
    assert same < MODEL_BUDGET
    assert inputs[0]
    is_image = batches[0]["input_ids"] == batches[0]["input_ids"][0, 3]
    for new, old in zip(*inputs, strict=True):
        assert (new != old).any(-1).sum() >= is_image.sum()
