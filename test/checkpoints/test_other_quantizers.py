"""Checkpoints whose attention is quantized too, by another library. test_sweep.py covers all loaders."""

import json

import pytest
import tiny_published as published
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_load import logits

import ktops
from ktops.checkpoints import CheckpointError
from ktops.cli.convert import Options, convert
from ktops.cli.errors import UserError
from ktops.cli.models import load_model, quantize_experts
from ktops.nn import KTExperts
from ktops.testing.budgets import relative_error

pytestmark = pytest.mark.usefixtures("enabled")

BUDGET = 1e-5


def load(path, **options):
    """Returns the model, which has found all of its weights."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(isinstance(layer.mlp.experts, KTExperts) for layer in model.model.layers)
    return model


def expected(dense):
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, experts_implementation="eager")
    return logits(model)


def converted(source, weight_format="fp32"):
    """Runs `ktops convert` into a sibling directory; fp32 can hold the weights of every scheme."""
    destination = source.parent / "converted"
    convert(Options(source, destination, weight_format), Console(quiet=True))
    return destination


WAYS = {
    "convert": lambda source: load(converted(source)),
    "KTConfig": lambda source: load(source, quantization_config=ktops.KTConfig("fp32")),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("scheme", published.DECODED)
def test_logits(tmp_path, scheme, attention, way):
    """Keys and values have one and a half blocks of FP8."""
    source, dense = published.write(tmp_path, scheme, attention=attention)
    assert relative_error(logits(WAYS[way](source)), expected(dense)) < BUDGET


@pytest.mark.parametrize("scheme", ["fp8", "compressed int4", "gptq"])
def test_without_ktops_it_is_an_error(tmp_path, scheme):
    """transformers would initialize new experts, even if it is told how to run them."""
    source, _ = published.write(tmp_path, scheme, attention=scheme != "gptq")
    destination = converted(source, "int8")
    ktops.disable()
    for options in ({}, {"experts_implementation": "eager"}):
        with pytest.raises(ValueError, match="has no `quant_method` attribute"):
            transformers.AutoModelForCausalLM.from_pretrained(destination, **options)


@pytest.mark.parametrize("scheme", published.DECODED)
def test_saved_and_loaded_again(tmp_path, scheme):
    """The decoded attention is saved in the form used to compute, and no longer needs another quantizer."""
    source, _ = published.write(tmp_path, scheme, attention=True)
    model = load(source, quantization_config=ktops.KTConfig("int8"))
    model.save_pretrained(tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert said["quantization_config"] == {"loader": "ktops"}
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_experts_loaded_beside_another_quantizer(tmp_path):
    """compressed-tensors loads the model and keeps its attention packed; then the experts are loaded."""
    source, dense = published.write(tmp_path, "compressed int4", attention=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    ktops.load_experts(model, source, show_progress=False)
    model.save_pretrained(tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert said["loader"] == "ktops" and said["other"]["quant_method"] == "compressed-tensors"
    assert relative_error(logits(load(tmp_path / "saved")), expected(dense)) < BUDGET


def test_arguments_of_from_pretrained(tmp_path):
    source, _ = published.write(tmp_path, "fp8", attention=True)
    destination = converted(source, "int8")
    given = ktops.KTConfig("int4", group_size=32)
    model = load(destination, quantization_config=given)
    assert model.model.layers[0].mlp.experts.down_proj.format == "int4" and given.other is None
    fp8 = transformers.FineGrainedFP8Config(dequantize=True)
    assert load(destination, quantization_config=fp8).model.layers[0].mlp.experts.down_proj.format == "int8"
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="must be a KTConfig for a model with only the experts quantized"):
        load(tmp_path / "saved", quantization_config=fp8)


def changed(source, change):
    """Replaces some tensors of the checkpoint by others, or removes them."""
    tensors = load_file(source / "model.safetensors")
    save_file(change(tensors), source / "model.safetensors", {"format": "pt"})
    return source


def forget_quantization(source) -> None:
    """Removes the quantization_config from config.json."""
    said = json.loads((source / "config.json").read_text())
    del said["quantization_config"]
    (source / "config.json").write_text(json.dumps(said))


def without(part: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


MISSING = {
    "attention": (
        "layers.1.self_attn.k_proj",
        "layers.1.self_attn.k_proj.weight of Qwen3MoeForCausalLM: not in",
    ),
    "router": ("layers.0.mlp.gate", "layers.0.mlp.gate.weight of Qwen3MoeForCausalLM: not in the checkpoint"),
    "expert": ("layers.0.mlp.experts.2", "layers.0.mlp.experts.2: the gate projection is missing"),
    "layer": ("layers.0.mlp.experts.", "layers.0.mlp.experts: the experts of layer 0 are missing"),
}


@pytest.mark.parametrize("part", MISSING)
def test_weights_that_are_missing(tmp_path, part):
    """transformers initializes them at random and logs that."""
    name, message = MISSING[part]
    source, _ = published.write(tmp_path, "compressed fp8", attention=True)
    changed(source, without(name))
    with pytest.raises(CheckpointError, match=message):
        load(source, quantization_config=ktops.KTConfig())
    with pytest.raises(UserError, match=r"published cannot be loaded: .*layers"):
        load_model(str(source), torch.float32, "ktops")


def test_heads_may_be_missing_but_not_to_finetune(tmp_path):
    source, _ = published.write(tmp_path, "fp8", attention=True)
    changed(source, without("lm_head"))
    kt = ktops.KTConfig("int8")
    kind = transformers.AutoModelForSequenceClassification
    assert kind.from_pretrained(source, quantization_config=kt, num_labels=3).score.out_features == 3
    with pytest.raises(UserError, match=r"lm_head.weight of Qwen3MoeForCausalLM: not in the checkpoint"):
        load_model(str(converted(source)), torch.float32, "ktops")


def test_scales_that_no_configuration_names(tmp_path):
    """Codes would be read as weights."""
    source, _ = published.write(tmp_path, "fp8", attention=True)
    forget_quantization(source)
    message = (
        "self_attn.k_proj.weight_scale_inv, .* and 4 more: the weights of Qwen3MoeForCausalLM are quantized"
    )
    with pytest.raises(CheckpointError, match=message):
        load(source, quantization_config=ktops.KTConfig())
    with pytest.raises(UserError, match=message):
        load_model(str(converted(source)), torch.float32, "ktops")


def test_experts_that_transformers_does_not_find(tmp_path):
    """The caller requested ktops' implementation, but not its loader."""
    source, _ = published.write(tmp_path, "compressed int4", attention=False)
    forget_quantization(source)
    with pytest.raises(CheckpointError, match=r"mlp.experts.down_proj, .* would initialize them at random"):
        transformers.AutoModelForCausalLM.from_pretrained(source, experts_implementation="ktops")
    assert load(source, quantization_config=ktops.KTConfig(), experts_implementation="ktops")


def test_another_implementation_of_converted_experts(tmp_path):
    source, _ = published.write(tmp_path, "fp8", attention=False)
    with pytest.raises(UserError, match=r"--experts-implementation eager: the experts in .* are in a format"):
        load_model(str(converted(source)), torch.float32, "eager")


@pytest.mark.parametrize("scheme", ["fp8", "compressed int4", "gptq"])
def test_finetune_in_another_format(tmp_path, scheme):
    """`ktops finetune --weight-format` first decodes all of a published quantized model."""
    source, dense = published.write(tmp_path, scheme, attention=scheme != "gptq")
    model = load_model(str(source), torch.float32, "ktops", keep_format=False)
    assert relative_error(logits(model), expected(dense)) < BUDGET
    report = quantize_experts(model, "int8")
    assert report.dtype == "f32" and report.relative_error < 0.01
    assert model.model.layers[1].mlp.experts.gate_up_proj.format == "int8"
    assert relative_error(logits(model), expected(dense)) < 0.05


def test_finetune_of_converted_experts_in_another_format(tmp_path):
    source, _ = published.write(tmp_path, "fp8", attention=True)
    model = load_model(str(converted(source, "int8")), torch.float32, "ktops", keep_format=False)
    with pytest.raises(UserError, match=r"--weight-format int4: .* its weights are already in format 'int8'"):
        quantize_experts(model, "int4")


def test_another_implementation_of_quantized_experts(tmp_path):
    """Loads the model with FP8 decoded by transformers, for comparison."""
    source, dense = published.write(
        tmp_path, "fp8", attention=True, head_dim=64, moe_intermediate_size=128, attn_implementation="eager"
    )
    model = load_model(str(source), torch.float32, "eager")
    assert relative_error(logits(model), expected(dense)) < BUDGET


def test_blocks_that_transformers_decodes_wrongly(tmp_path):
    """transformers reads 192 rows of keys with two blocks of 128 as two blocks of 96."""
    source, _ = published.write(tmp_path, "fp8", attention=True)
    message = (
        r"--experts-implementation eager: transformers would decode .*self_attn.k_proj.weight in .* wrongly: "
        r"\[192, 128\] in blocks of \[128, 128\]"
    )
    with pytest.raises(UserError, match=message):
        load_model(str(source), torch.float32, "eager")
