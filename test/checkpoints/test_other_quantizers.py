"""Checkpoints whose attention another library has quantized too: by every way in, right or a named error."""

import json

import published
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_load import logits

import ktops
from ktops.checkpoints import CheckpointError, open_checkpoint
from ktops.cli.convert import Options, convert
from ktops.cli.errors import UserError
from ktops.cli.models import load_model
from ktops.nn import KTExperts
from ktops.testing.budgets import relative_error

BUDGET = 1e-5


@pytest.fixture(autouse=True)
def enabled():
    ktops.enable()
    yield
    ktops.disable()


def load(path, **options):
    """The model, which has found all of its weights."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(isinstance(layer.mlp.experts, KTExperts) for layer in model.model.layers)
    return model


def expected(dense):
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, experts_implementation="eager")
    return logits(model)


def converted(source, weight_format="fp32"):
    """`ktops convert` into a directory beside it; fp32 holds what every scheme means."""
    destination = source.parent / "converted"
    convert(Options(source, destination, weight_format), Console(quiet=True))
    return destination


WAYS = {
    "convert": lambda source: load(converted(source)),
    "KTConfig": lambda source: load(source, quantization_config=ktops.KTConfig()),
    "KTConfig in a format": lambda source: load(source, quantization_config=ktops.KTConfig("fp32")),
    "finetune": lambda source: load_model(str(converted(source)), torch.float32, "ktops"),
}


@pytest.mark.filterwarnings("ignore:ktops. the GPTQ weights were quantised in an order")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("scheme", published.PUBLISHED)
def test_logits(tmp_path, scheme, attention, way):
    source, dense = published.write(tmp_path, scheme, attention=attention)
    if attention and scheme not in published.DECODED:
        error = UserError if way == "finetune" else ImportError
        with pytest.raises(
            error, match="other tensors in it are quantized too, and what reads those cannot run"
        ):
            WAYS[way](source)
        return
    model = WAYS[way](source)
    assert relative_error(logits(model), expected(dense)) < BUDGET
