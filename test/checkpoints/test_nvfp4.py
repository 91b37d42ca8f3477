"""NVFP4 of ModelOpt and compressed-tensors, which is decoded exactly and quantized to another format."""

import json

import every_model
import numpy
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from model_runs import MODEL_BUDGET
from safetensors.torch import load_file, save_file
from tiny_checkpoints import decode, write_per_expert
from tiny_schemes import e2m1, floats

import ktops
from ktops.checkpoints import CheckpointError, open_checkpoint
from ktops.nn import KTExperts
from ktops.testing.budgets import relative_error


def modelopt(rng, rows, columns):
    codes, values = e2m1(rng, rows, columns)
    scale = floats(rng, rows, columns // 16).mul(60).to(torch.float8_e4m3fn)
    whole = floats(rng, 1).reshape([]).mul(2.0**-10)
    tensors = {
        "weight": torch.from_numpy(codes),
        "weight_scale": scale,
        "weight_scale_2": whole,
        "input_scale": torch.ones([]),
    }
    return tensors, values * (scale.float() * whole).repeat_interleave(16, 1)


def compressed_tensors(rng, rows, columns):
    """Uses the library's own compressor, and what it decodes before it rounds to bfloat16."""
    arguments = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    weight = floats(rng, rows, columns)
    whole = (448 * 6 / weight.abs().max()).reshape(1)
    largest = weight.unflatten(-1, (-1, 16)).abs().amax(-1)
    scale = (whole * largest / 6).to(torch.float8_e4m3fn)
    state = {"weight": weight, "weight_scale": scale.float(), "weight_global_scale": whole}
    state = compressor.compress(state, scheme)
    codes = unpack_fp4_from_uint8(state["weight_packed"], rows, columns, torch.float32)
    dense = dequantize(codes, state["weight_scale"].float(), args=arguments, global_scale=whole)
    assert torch.equal(dense.bfloat16(), compressor.decompress(state, scheme)["weight"])
    return state, dense


MAKERS = {"modelopt": modelopt, "compressed-tensors": compressed_tensors}


@pytest.mark.parametrize("library", MAKERS)
@pytest.mark.parametrize("weight_format", ["bf16", "fp32", "int8", "mxfp4"])
def test_weights(tmp_path, library, weight_format):
    (dense,) = write_per_expert(tmp_path, MAKERS[library], layers=1)
    (layer,) = open_checkpoint(tmp_path).layers
    assert layer.scheme == "nvfp4"
    exact = [decode(weight) for weight in layer.read("fp32")[:2]]
    for ours, theirs in zip(exact, dense, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    for weight, floats_ in zip(layer.read(weight_format)[:2], exact, strict=True):
        expected = ktops.quantize(floats_, weight_format)
        assert torch.equal(weight.weight, expected.weight)


FAULTS = {
    "none": (lambda tensors: None, r".* in .*: ktops has no format for NVFP4. Pass weight_format"),
    "missing": (lambda tensors: tensors.pop("weight_scale"), r".* in .*: weight_scale is missing"),
    "shape": (
        lambda tensors: tensors.update(weight_scale=tensors["weight_scale"][:, ::2].contiguous()),
        r"_scale in .*: must have shape \[160, 4\], got \[160, 2\]",
    ),
    "dtype": (
        lambda tensors: tensors.update(weight_packed=tensors.pop("weight_packed").view(torch.int8)),
        r"_packed in .*: must be torch.uint8, got torch.int8",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors(tmp_path, fault):
    """Nothing is decoded to 16 bits unless the caller says so; missing and wrong tensors are named."""
    change, message = FAULTS[fault]

    def make(rng, rows, columns):
        tensors, dense = compressed_tensors(rng, rows, columns)
        change(tensors)
        return tensors, dense

    write_per_expert(tmp_path, make, layers=1)
    (layer,) = open_checkpoint(tmp_path).layers
    with pytest.raises(CheckpointError, match=rf"experts\.0\.gate_proj\.weight{message}"):
        layer.experts()


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("weight_format", ["bf16", "int8"])
@torch.no_grad()
def test_nemotron_h(tmp_path, monkeypatch, weight_format):
    """As NVIDIA publishes it: experts without a gate, in NVFP4; attention in bfloat16."""
    for key in ("hidden_size", "moe_intermediate_size"):
        monkeypatch.setitem(every_model.SIZES, key, 64)
    model = every_model.tiny_model("nemotron_h").eval()
    model.save_pretrained(tmp_path)
    rng, tensors = numpy.random.default_rng(0), load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        parts, dense = modelopt(rng, *tensors.pop(name).shape)
        base, expert, projection, _ = name.rsplit(".", 3)
        tensors.update({f"{name.removesuffix('weight')}{kind}": part for kind, part in parts.items()})
        module = model.get_submodule(base.replace("backbone.", "model."))
        exact = getattr(module, projection)[int(expert)]
        exact.copy_(decode(ktops.quantize(dense[None], weight_format))[0])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, info = type(model).from_pretrained(
        tmp_path,
        quantization_config=ktops.KTConfig(weight_format),
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(info.values())
    for module in loaded.modules():
        if isinstance(module, KTExperts):
            module.compute = "bf16"
            assert (module.function.gating, module.up_proj.format) == ("none", weight_format)
    batch = every_model.tiny_batch("nemotron_h")
    assert relative_error(loaded.eval()(**batch).logits, model(**batch).logits) < MODEL_BUDGET
