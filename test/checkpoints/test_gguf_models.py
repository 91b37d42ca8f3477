"""GGUF files of models whose experts are not silu(gate) * up, written and decoded by the gguf package."""

import every_model
import gguf
import numpy
import pytest
import torch
from model_runs import MODEL_BUDGET
from rich.console import Console
from tiny_checkpoints import write_gguf

import ktops
from ktops.checkpoints import open_checkpoint
from ktops.cli.convert import Options, convert
from ktops.nn import KTExperts
from ktops.testing.budgets import relative_error

pytestmark = pytest.mark.usefixtures("enabled")

MXFP4 = gguf.GGMLQuantizationType.MXFP4
SIZE = {"gate": 0.1, "up": 0.5, "down": 0.1}
"""The projections' standard deviations; blocks of gate and of up have different scales."""


@pytest.fixture
def sizes(monkeypatch):
    """Rows of whole blocks of 32 weights, and gate and up of whole blocks of 128 rows."""
    for key, size in {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 128}.items():
        monkeypatch.setitem(every_model.SIZES, key, size)


def interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.stack([gate, up], dim=2).flatten(1, 2)


@torch.no_grad()
def write(folder: str, path, weight_format: str = "fp32") -> torch.nn.Module:
    """Writes random MXFP4 experts as llama.cpp names them.

    Returns:
        The model with their decoded weights, rounded to a format.
    """
    model, rng, tensors = every_model.tiny_model(folder).eval(), numpy.random.default_rng(0), {}
    for name, module in model.named_modules():
        if not name.endswith(".experts"):
            continue
        first = module.gate_up_proj if module.has_gate else module.up_proj
        num_experts, inner, outer = module.down_proj.shape
        if not module.is_transposed:
            inner, outer = outer, inner
        shapes = {"gate": (inner, outer), "up": (inner, outer), "down": (outer, inner)}
        decoded, biases = {}, {}
        for part, shape in shapes.items():
            if part == "gate" and not module.has_gate:
                continue
            prefix = f"blk.{name.split('.')[2]}.ffn_{part}_exps"
            weights = SIZE[part] * rng.standard_normal((num_experts, *shape), numpy.float32)
            blocks = gguf.quantize(weights, MXFP4)
            tensors[f"{prefix}.weight"] = blocks, MXFP4
            decoded[part] = torch.from_numpy(gguf.dequantize(blocks, MXFP4))
            if module.has_bias:
                biases[part] = rng.standard_normal((num_experts, shape[0]), numpy.float32)
                tensors[f"{prefix}.bias"] = biases[part]
        rows = torch.cat([decoded[part] for part in ("gate", "up") if part in decoded], 1)
        rows, down = (ktops.dequantize(ktops.quantize(w, weight_format)) for w in (rows, decoded["down"]))
        gate_up = interleaved(*rows.chunk(2, 1)) if module.has_gate else rows
        first.copy_(gate_up.mT if module.is_transposed else gate_up)
        module.down_proj.copy_(down.mT if module.is_transposed else down)
        if module.has_bias:
            parts = {part: torch.from_numpy(bias) for part, bias in biases.items()}
            module.gate_up_proj_bias.copy_(interleaved(parts["gate"], parts["up"]))
            module.down_proj_bias.copy_(parts["down"])
    write_gguf(path, tensors)
    return model


@torch.no_grad()
def logits(model, folder: str) -> torch.Tensor:
    for module in model.modules():
        if isinstance(module, KTExperts):
            module.compute = "bf16"
    return model.eval()(**every_model.tiny_batch(folder)).logits


def loaded(model, folder: str, path, **options):
    """Returns another random model with the experts of a file or directory."""
    other = every_model.tiny_model(folder)
    parameters = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        if ".experts." not in name:
            parameter.data = parameters[name].data
    ktops.load_experts(other, path, show_progress=False, **options)
    return other


@pytest.mark.parametrize("folder", ["gpt_oss", "nemotron_h"])
def test_logits(tmp_path, sizes, folder):
    """llama.cpp stores gate and up of gpt-oss apart; rows alternate in the model."""
    model = write(folder, tmp_path / "model.gguf")
    other = loaded(model, folder, tmp_path / "model.gguf")
    assert {m.down_proj.format for m in other.modules() if isinstance(m, KTExperts)} == {"mxfp4"}
    assert relative_error(logits(other, folder), logits(model, folder)) < MODEL_BUDGET


@pytest.mark.parametrize("weight_format", ["fp32", "fp8_e4m3"])
@pytest.mark.parametrize("folder", ["gpt_oss", "nemotron_h"])
def test_converted(tmp_path, sizes, folder, weight_format):
    """Nothing in the directory names the model, but the order of gate and up is recorded."""
    model = write(folder, tmp_path / "model.gguf", weight_format)
    convert(Options(tmp_path / "model.gguf", tmp_path / "out", weight_format), Console(quiet=True))
    (layer, *_) = open_checkpoint(tmp_path / "out").layers
    assert layer.gating == {"gpt_oss": "concatenated", "nemotron_h": "none"}[folder]
    other = loaded(model, folder, tmp_path / "out")
    assert relative_error(logits(other, folder), logits(model, folder)) < MODEL_BUDGET
