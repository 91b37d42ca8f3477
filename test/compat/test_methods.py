"""Every method name constructs, stores its format, and computes with the stored weights."""

import pytest
import torch
from tiny_layer import (
    TOKENS,
    adapters,
    assert_close,
    inputs,
    make,
    reference,
    reference_gradients,
    train,
    weights,
)

import ktops
from ktops.compat import INFERENCE_METHODS, SFT_METHODS
from ktops.testing.budgets import forward_budget, gradient_budget

pytestmark = pytest.mark.usefixtures("single_thread")

BF16 = torch.bfloat16

FORMATS = {
    "AMXINT4": ("int4", 0), "AMXINT8": ("int8", 0), "MOE_INT4": ("int4", 0), "MOE_INT8": ("int8", 0),
    "RAWINT4": ("int4", 32), "FP8": ("fp8_e4m3", 128), "FP8_PERCHANNEL": ("fp8_e4m3", 0),
    "GPTQ_INT4": ("uint4", 64), "MXFP4": ("mxfp4", 32), "MXFP8": ("mxfp8", 32), "BF16": ("bf16", 0),
    "AMXBF16_SFT": ("bf16", 0), "AMXINT8_SFT": ("int8", 0), "AMXINT4_SFT": ("int4", 0),
    "AMXINT4_1_SFT": ("uint4", 0), "AMXINT4_KGroup_SFT": ("int4", 64), "AMXINT4_1KGroup_SFT": ("uint4", 64),
    "FP8_SFT": ("fp8_e4m3", 128), "RAWINT4_SFT": ("int4", 32), "MXFP4_SFT": ("mxfp4", 32),
    "INT8_SFT": ("int8", 0), "AMXFP8_SFT": ("fp8_e4m3", 128),
}  # fmt: skip
"""Formats and group sizes with the constructor's group_size 64."""

SKIP = "_SkipLoRA"


def test_the_table_has_every_method():
    assert {name.removesuffix(SKIP) for name in SFT_METHODS} | INFERENCE_METHODS.keys() == FORMATS.keys() | {
        "LLAMAFILE"
    }
    assert len(SFT_METHODS) == 2 * len([name for name in FORMATS if name.endswith("_SFT")])


@pytest.mark.parametrize("method", [*FORMATS, f"AMXINT4_1KGroup_SFT{SKIP}"])
def test_weights_are_those_of_the_format(method):
    """The result equals quantizing all experts at once, with the gate's rows above those of up."""
    wrapper = make(method, group_size=64)
    format, group_size = FORMATS[method.removesuffix(SKIP)]
    gate, up, down = weights(wrapper)
    for actual, given in ((wrapper.gate_up_proj, torch.cat([gate, up], 1)), (wrapper.down_proj, down)):
        if format == "bf16":
            assert torch.equal(actual, given)
            continue
        expected = ktops.quantize(given, format, group_size=group_size)
        assert (actual.format, actual.group_size, actual.dtype) == (format, group_size, BF16)
        assert actual.shape == given.shape
        for code, exact in zip(actual.codes, expected.codes, strict=True):
            assert (code is None) == (exact is None)
            assert code is None or torch.equal(code.view(torch.uint8), exact.view(torch.uint8))


@pytest.mark.parametrize("method", [name for name in INFERENCE_METHODS if name != "LLAMAFILE"])
def test_inference(method):
    wrapper = make(method)
    wrapper.compute = "bf16"
    routed = inputs(wrapper)
    output = wrapper.forward(*routed)
    assert output.dtype == BF16
    assert_close({"output": output}, {"output": reference(wrapper, *routed)}, forward_budget(BF16))


@pytest.mark.parametrize("method", SFT_METHODS)
def test_training(method):
    wrapper = make(method)
    factors = adapters(wrapper)
    wrapper.init_lora_weights(**factors)
    used = {} if method.endswith(SKIP) else factors
    routed = inputs(wrapper)
    grad_output = torch.randn(routed[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    actual = train(wrapper, routed, used, grad_output)
    expected = reference_gradients(wrapper, routed, used, grad_output)
    assert_close(actual, expected, gradient_budget(BF16))
    assert {name: value.dtype for name, value in actual.items()} == {
        name: torch.float32 if name == "grad_weights" else BF16 for name in actual
    }
    if not used:
        assert not any(getattr(wrapper, f"grad_{name}").any() for name in factors)


def test_integer_products_by_default():
    """int8 compute rounds every row of activations to ±127 of its largest element.

    That is an error uniform in ±amax/254 in the input of both products. For N(0, 1) rows of H = 64 elements
    the largest is below 4.5, so the error is at most 4.5/254/√3 = 1 % of the row's RMS. Gate, up and down add
    in quadrature, with a factor of two for the slope of the activation and the different distribution of h.
    """
    wrapper = make("AMXINT8")
    routed = inputs(wrapper, 64)
    expected = reference(wrapper, *routed)
    error = 4.5 / 254 / 3**0.5
    budget = 2 * error * 3**0.5
    assert_close({"output": wrapper.forward(*routed)}, {"output": expected}, budget)


def test_zero_point_can_be_left_out():
    wrapper = make("AMXINT4_1KGroup_SFT", zero_point=False)
    assert (wrapper.gate_up_proj.format, wrapper.gate_up_proj.group_size) == ("int4", 32)


def test_formats_of_llamafile_come_from_a_file():
    wrapper = make("LLAMAFILE", load=False)
    with pytest.raises(NotImplementedError, match="'LLAMAFILE' takes its formats from a GGUF file"):
        wrapper.load_weights_from_tensors(*weights(wrapper))


def test_two_wrappers_of_different_sizes():
    small = make("BF16")
    large = make(
        "AMXBF16_SFT", num_experts=6, num_experts_per_tok=3, hidden_size=96, moe_intermediate_size=32
    )
    large.init_lora_weights(**adapters(large))
    for _ in range(2):
        routed = inputs(small)
        assert_close(
            {"output": small.forward(*routed)}, {"output": reference(small, *routed)}, forward_budget(BF16)
        )
        routed, grad_output = inputs(large), torch.ones(TOKENS, 96, dtype=BF16)
        expected = reference_gradients(large, routed, adapters(large), grad_output)
        assert_close(train(large, routed, adapters(large), grad_output), expected, gradient_budget(BF16))
