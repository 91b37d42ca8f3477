"""load_weights: every method loads the checkpoints that it is meant for."""

import os

import gguf
import numpy
import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import write_gguf, write_per_expert
from tiny_layer import (
    SIZES,
    adapters,
    assert_close,
    dense,
    inputs,
    make,
    reference,
    reference_gradients,
    train,
)
from tiny_schemes import SCHEMES

import ktops
from ktops._warn import warn_once
from ktops.testing.budgets import forward_budget, gradient_budget

pytestmark = pytest.mark.usefixtures("single_thread")

BF16 = torch.bfloat16
E, H, I = SIZES["num_experts"], SIZES["hidden_size"], SIZES["moe_intermediate_size"]  # noqa: E741

AS_STORED = {
    "BF16": ("bf16",),
    "FP8": ("fp8 blocks", "fp8 blocks bf16"),
    "FP8_PERCHANNEL": ("fp8 per channel", "fp8 per tensor"),
    "RAWINT4": ("pack-quantized",),
    "GPTQ_INT4": ("gptq", "gptq zero points", "gptq act-order", "awq"),
    "MXFP4": ("mxfp4",),
    "MXFP8": ("mxfp8",),
    "AMXBF16_SFT": ("bf16",),
    "FP8_SFT": ("fp8 blocks",),
    "RAWINT4_SFT": ("pack-quantized",),
    "MXFP4_SFT": ("mxfp4",),
}
"""Maps each method to the schemes whose weights it uses unchanged."""

QUANTIZED = {
    "AMXINT4": ("int4", 0), "AMXINT8": ("int8", 0), "MOE_INT4": ("int4", 0), "MOE_INT8": ("int8", 0),
    "RAWINT4": ("int4", 32), "GPTQ_INT4": ("uint4", 64), "AMXINT4_KGroup_SFT": ("int4", 64),
}  # fmt: skip


def write(folder, scheme: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Writes a checkpoint; returns gate_up [E, 2I, H] and down [E, H, I] of its layers in float32."""
    return write_per_expert(folder, SCHEMES[scheme][0], num_experts=E, hidden=H, intermediate=I)


def load(method: str, path, order=None, **options):
    wrapper = make(method, load=False, weight_path=str(path), **{"layer_idx": 1, "group_size": 64} | options)
    wrapper.compute = "bf16"
    wrapper.load_weights(order)
    return wrapper


def assert_holds(wrapper, gate_up: torch.Tensor, down: torch.Tensor) -> None:
    assert torch.equal(dense(wrapper.gate_up_proj), gate_up.double())
    assert torch.equal(dense(wrapper.down_proj), down.double())


@pytest.mark.filterwarnings("ignore:ktops. the GPTQ weights were quantized with reordered columns")
@pytest.mark.parametrize(
    ("method", "scheme"), [(method, scheme) for method, schemes in AS_STORED.items() for scheme in schemes]
)
def test_weights_as_they_are_stored(tmp_path, method, scheme):
    layers = write(tmp_path, scheme)
    wrapper = load(method, tmp_path)
    assert_holds(wrapper, *layers[1])
    routed = inputs(wrapper)
    if wrapper.mode == "inference":
        output = wrapper.forward(*routed)
        assert_close({"output": output}, {"output": reference(wrapper, *routed)}, forward_budget(BF16))
        return
    factors = adapters(wrapper)
    wrapper.init_lora_weights(**factors)
    grad = torch.ones_like(routed[0])
    expected = reference_gradients(wrapper, routed, factors, grad)
    assert_close(train(wrapper, routed, factors, grad), expected, gradient_budget(BF16))


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_while_loading(tmp_path, recwarn, method):
    layers = write(tmp_path, "bf16")
    wrapper = load(method, tmp_path)
    format, group_size = QUANTIZED[method]
    for weight, given in zip((wrapper.gate_up_proj, wrapper.down_proj), layers[1], strict=True):
        assert (weight.format, weight.group_size) == (format, group_size)
        assert torch.equal(dense(weight), dense(ktops.quantize(given, format, group_size=group_size)))
    assert not [warning for warning in recwarn if "quantized again" in str(warning.message)]


def test_quantized_again_with_a_warning(tmp_path):
    warn_once.cache_clear()
    layers = write(tmp_path, "fp8 blocks")
    with pytest.warns(UserWarning, match="is fp8 blocks: quantized again, to int8"):
        wrapper = load("AMXINT8", tmp_path)
    assert torch.equal(dense(wrapper.gate_up_proj), dense(ktops.quantize(layers[1][0], "int8")))


def write_gguf_experts(path, kind: str) -> list[torch.Tensor]:
    """Writes a GGUF file of layer 1; returns gate, up and down as decoded by the gguf package."""
    rng, tensors = numpy.random.default_rng(0), {}
    kind, decoded = gguf.GGMLQuantizationType[kind], []
    for name, shape in (("gate", (E, I, H)), ("up", (E, I, H)), ("down", (E, H, I))):
        weights = rng.standard_normal(shape).astype(numpy.float32) / shape[2] ** 0.5
        data = gguf.quantize(weights, kind)
        tensors[f"blk.1.ffn_{name}_exps.weight"] = data, kind
        decoded.append(torch.from_numpy(gguf.dequantize(data, kind)))
    write_gguf(path, tensors)
    return decoded


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16"])
def test_llamafile(tmp_path, kind):
    """The intermediate size is not a multiple of 256; the type is that of the file."""
    gate, up, down = write_gguf_experts(tmp_path / "model.gguf", kind)
    wrapper = load("LLAMAFILE", tmp_path / "model.gguf")
    assert wrapper.gate_up_proj.format == {"F16": "fp16"}.get(kind, kind.lower())
    assert_holds(wrapper, torch.cat([gate, up], 1), down)
    routed = inputs(wrapper)
    output = wrapper.forward(*routed)
    assert_close({"output": output}, {"output": reference(wrapper, *routed)}, forward_budget(BF16))


@pytest.mark.parametrize(("method", "scheme"), [("BF16", "bf16"), ("GPTQ_INT4", "gptq zero points")])
def test_physical_to_logical_map(tmp_path, method, scheme):
    ((gate_up, down),) = write(tmp_path, scheme)[1:]
    order = torch.tensor([3, 1, 1, 0])
    assert_holds(load(method, tmp_path, order), gate_up[order], down[order])


def test_a_checkpoint_written_anew_is_read_anew(tmp_path):
    before = write(tmp_path, "bf16")
    assert_holds(load("BF16", tmp_path), *before[1])
    after = write_per_expert(tmp_path, SCHEMES["bf16"][0], num_experts=E, hidden=H, intermediate=I, seed=5)
    for number, file in enumerate(sorted(tmp_path.glob("*.safetensors"))):
        os.utime(file, ns=(number, number))
    assert not torch.equal(before[1][0], after[1][0])
    assert_holds(load("BF16", tmp_path), *after[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_idx": 7}, r"layer_idx must be one layer with experts, got 7: .* model.layers.\{0 to 1\}"),
        ({"num_experts": 3}, "num_experts must be 4 for model.layers.1.mlp.experts in .*, got 3"),
        ({"hidden_size": 32}, "hidden_size must be 64 .*, got 32"),
        ({"moe_intermediate_size": 32}, "moe_intermediate_size must be 96 .*, got 32"),
        ({"weight_path": ""}, "weight_path must name a checkpoint for load_weights, got none"),
        ({"weight_path": "/nowhere"}, "no such file or directory"),
    ],
)
def test_errors(tmp_path, options, message):
    write(tmp_path, "bf16")
    wrapper = make("BF16", load=False, **{"layer_idx": 1, "weight_path": str(tmp_path)} | options)
    with pytest.raises(ValueError, match=message):
        wrapper.load_weights()
    assert wrapper.gate_up_proj is None


def test_a_missing_tensor_leaves_the_old_weights(tmp_path):
    wrapper = make("BF16", weight_path=str(tmp_path))
    before = wrapper.gate_up_proj
    save_file(
        {"model.layers.0.mlp.experts.0.gate_proj.weight": torch.zeros(I, H)}, tmp_path / "m.safetensors"
    )
    with pytest.raises(ValueError, match="up projection of the experts is missing"):
        wrapper.load_weights()
    assert wrapper.gate_up_proj is before


def test_biases_are_refused(tmp_path):
    experts = "model.layers.0.mlp.experts"
    save_file(
        {
            f"{experts}.gate_up_proj": torch.zeros(E, 2 * I, H, dtype=BF16),
            f"{experts}.down_proj": torch.zeros(E, H, I, dtype=BF16),
            f"{experts}.gate_up_proj_bias": torch.zeros(E, 2 * I, dtype=BF16),
            f"{experts}.down_proj_bias": torch.zeros(E, H, dtype=BF16),
        },
        tmp_path / "model.safetensors",
    )
    wrapper = make("BF16", load=False, weight_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"has biases, .*: use ktops\.load_experts"):
        wrapper.load_weights()
