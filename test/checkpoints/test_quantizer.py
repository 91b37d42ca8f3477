"""from_pretrained with KTConfig, and models in transformers' own FP8 layout."""

import json

import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_load import config, logits, tiny_model
from tiny_checkpoints import decode

import ktops
from ktops.checkpoints import CheckpointWriter, converted_config, open_checkpoint
from ktops.integrations.loading import PendingExperts
from ktops.nn import KTExperts
from ktops.testing.budgets import relative_error

FORMATS = {"int8": None, "int4": 32, "bf16": None, "q8_0": None, "fp8_e4m3": 128}

pytestmark = pytest.mark.usefixtures("enabled")


@pytest.fixture
def saved(tmp_path):
    """A dense model and the directory in which it is saved."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "dense")
    return model, tmp_path / "dense"


def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)


def experts(model) -> list[KTExperts]:
    return [layer.mlp.experts for layer in model.model.layers]


def with_decoded_experts(quantized, model):
    """Returns a dense model with the experts of a quantized one."""
    for layer, loaded in zip(model.model.layers, experts(quantized), strict=True):
        layer.mlp.experts.gate_up_proj.data = decode(loaded.gate_up_proj)
        layer.mlp.experts.down_proj.data = decode(loaded.down_proj)
    return model


@pytest.mark.parametrize("name", FORMATS)
def test_logits(saved, name):
    model, path = saved
    kt = ktops.KTConfig(weight_format=name, group_size=FORMATS[name])
    quantized, info = load(path, quantization_config=kt)
    assert not any(info.values())
    for loaded, layer in zip(experts(quantized), model.model.layers, strict=True):
        expected = ktops.quantize(layer.mlp.experts.down_proj.detach(), name, group_size=FORMATS[name])
        assert torch.equal(loaded.down_proj.weight.view(torch.uint8), expected.weight.view(torch.uint8))
    assert relative_error(logits(quantized), logits(with_decoded_experts(quantized, model))) < 1e-5


def test_no_dense_experts_are_made(saved, monkeypatch):
    """While transformers loads weights, the model has no parameter of experts."""
    _, path = saved
    seen = []
    load_weights = transformers.PreTrainedModel._load_pretrained_model

    def watched(model, *args, **kwargs):
        seen.extend(name for name, _ in model.named_parameters())
        return load_weights(model, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "_load_pretrained_model", staticmethod(watched))
    load(path, quantization_config=ktops.KTConfig("int8"))
    assert seen and not any("experts" in name for name in seen)


@pytest.mark.parametrize("name", FORMATS)
def test_saved_and_loaded_again(saved, tmp_path, name):
    _, path = saved
    quantized, _ = load(path, quantization_config=ktops.KTConfig(name, group_size=FORMATS[name]))
    quantized.save_pretrained(tmp_path / "quantized")
    again, info = load(tmp_path / "quantized")
    assert not any(info.values())
    assert torch.equal(logits(quantized), logits(again))
    assert experts(again)[0].down_proj.format == name
    state = load_file(tmp_path / "quantized" / "model.safetensors")
    dense = [tensor for tensor in state.values() if tensor.dtype == torch.float32]
    assert not any(tensor.shape == experts(again)[0].down_proj.shape for tensor in dense)


@pytest.mark.parametrize("said", [{"quant_method": "ktops"}, {"loader": "ktops", "weight_format": "int4"}])
def test_formats_that_config_json_asks_for(saved, said):
    """The files may hold quantized weights, or the weights are quantized during loading."""
    _, path = saved
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**written, "quantization_config": said}))
    for options in ({}, {"quantization_config": ktops.KTConfig()}):
        model, _ = load(path, **options)
        assert experts(model)[0].down_proj.format == said.get("weight_format", "fp32")


def test_another_default_dtype(saved):
    """No dtype is given, so none can be wrong."""
    _, path = saved
    torch.set_default_dtype(torch.float16)
    try:
        model, _ = load(path, quantization_config=ktops.KTConfig("int8"), dtype=torch.bfloat16)
        dense = torch.zeros(2, 2, 3, dtype=torch.float32), torch.zeros(2, 3, 1, dtype=torch.float32)
        assert KTExperts.from_parameters(*map(torch.nn.Parameter, dense)).down_proj.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert experts(model)[0].down_proj.dtype == torch.bfloat16


def test_directory_of_the_writer(saved, tmp_path):
    _, path = saved
    source = open_checkpoint(path)
    writer = CheckpointWriter(tmp_path / "ktops")
    for layer in source.layers:
        writer.write_layer(layer.name, *layer.experts("int8"))
    writer.write_tensors(source.other_tensors())
    writer.copy(path.glob("*.json"))
    writer.write_config(converted_config(source.config, source.other_tensors()))
    writer.finish()
    quantized, info = load(tmp_path / "ktops")
    assert not any(info.values())
    reference, _ = load(path, quantization_config=ktops.KTConfig("int8"))
    assert torch.equal(logits(quantized), logits(reference))
    first = experts(quantized)[0].down_proj.weight
    assert torch.equal(first, open_checkpoint(tmp_path / "ktops").layers[0].read().down_proj.weight)


def test_experts_of_another_path(saved, tmp_path):
    _, path = saved
    other = tiny_model()
    torch.nn.init.ones_(other.model.layers[0].mlp.experts.down_proj)
    other.save_pretrained(tmp_path / "other")
    kt = ktops.KTConfig(experts_path=str(tmp_path / "other"))
    model, _ = load(path, quantization_config=kt)
    assert (decode(experts(model)[0].down_proj) == 1).all()
    assert "experts_path" not in kt.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_format": "int5"}, "format must be one of bf16"),
        ({"weight_format": "int4", "group_size": 5}, "group_size must be one of"),
        (
            {"weight_format": "int8", "method": "hqq"},
            "method must be one of rtn, mse for format 'int8', got 'hqq'",
        ),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ktops.KTConfig(**options)


def test_unknown_argument_of_the_config():
    with pytest.raises(TypeError, match="KTConfig: unknown arguments weightformat"):
        ktops.KTConfig(weightformat="int4")


def write_fp8(model, folder) -> None:
    """Writes the layout of DeepSeek-V3 and Qwen3 FP8: blocks of 128 x 128, and their configuration."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "proj.weight" in name and name.count(".") > 2]:
        weight = tensors[name].numpy()
        scale = numpy.empty([-(-size // 128) for size in weight.shape], numpy.float32)
        for row in range(scale.shape[0]):
            for column in range(scale.shape[1]):
                block = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
                scale[row, column] = abs(weight[block]).max() / 448
                weight[block] /= scale[row, column]
        tensors[name] = torch.from_numpy(weight).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.from_numpy(scale)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    skipped = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(2))]
    fp8 = transformers.FineGrainedFP8Config(modules_to_not_convert=skipped)
    written["quantization_config"] = fp8.to_dict()
    (folder / "config.json").write_text(json.dumps(written))


@pytest.mark.parametrize("intermediate", [128, 256])
def test_fp8_as_transformers_reads_it(tmp_path, intermediate):
    """transformers decodes the model to dense weights; ktops reads the experts of the same files as fp8."""
    sizes = config()
    sizes.hidden_size, sizes.moe_intermediate_size, sizes.head_dim = 128, intermediate, 32
    torch.manual_seed(0)
    write_fp8(transformers.Qwen3MoeForCausalLM(sizes).eval(), tmp_path)
    model, info = load(tmp_path, dtype=torch.float32, experts_implementation="eager")
    assert not any(info.values())
    expected = logits(model)
    dense = [layer.mlp.experts.gate_up_proj.detach().clone() for layer in model.model.layers]
    report = ktops.load_experts(model, tmp_path, show_progress=False)
    assert report.formats == {("fp8_e4m3", "fp8_e4m3"): 2} and report.schemes == {"fp8 blocks": 2}
    for loaded, weight in zip(experts(model), dense, strict=True):
        assert torch.equal(decode(loaded.gate_up_proj), weight)
    assert relative_error(logits(model), expected) < 1e-5


def test_experts_of_unknown_sizes_are_an_error():
    experts = torch.nn.Module()
    experts.has_gate, experts.act_fn = True, torch.nn.SiLU()
    experts.up_proj = torch.nn.Parameter(torch.zeros(4, 8, 16))
    with pytest.raises(ValueError, match="cannot infer sizes from the weights of Module"):
        PendingExperts(experts)
