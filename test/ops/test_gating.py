"""Interleaved gate and up, no gate, and the routes' own outputs."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ktops
from ktops.ops.arguments import GRADIENTS
from ktops.testing.budgets import forward_budget, relative_error
from ktops.testing.compare import check_against_reference, random_grad_output, run, threads
from ktops.testing.inputs import densified, floating, moe_inputs, require_grad
from ktops.testing.weights import in_format

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
OTHER_GATINGS = ("interleaved", "none")
OF_2I = ("gate_up_proj", "gate_up_bias", "gate_up_lora_B")


def interleaved(tensor: Tensor) -> Tensor:
    """Returns [E, 2I, ...] with gate and up rows interleaved instead of concatenated."""
    return tensor.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gating", OTHER_GATINGS)
@pytest.mark.parametrize(
    ("T", "H", "I"), [(0, 40, 24), (1, 40, 24), (7, 17, 1), (9, 24, 33), (70, 264, 150), (2, 24, 2100)]
)
def test_sizes(isa, T, H, I, gating, dtype):  # noqa: E741
    sizes = {"T": T, "H": H, "I": I, "E": 3, "K": 2, "lora_rank": (18, 5), "bias": True}
    for save in ("activations", "recompute"):
        check_against_reference(moe_inputs(**sizes, dtype=dtype, gating=gating, routing="skewed"), save=save)


@pytest.mark.parametrize("save", ["activations", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_interleaved_rows_change_no_bit(isa, dtype, save):
    """Except where backward sums over them, and so in another order: two of the gradients."""
    inputs = moe_inputs(
        T=33, H=40, I=40, E=4, K=2, dtype=dtype, lora_rank=(3, 5), bias=True, invalid_ids=True
    )
    grad_output = random_grad_output(inputs)
    expected = run(inputs, grad_output, save=save)
    in_turn = inputs | {name: interleaved(inputs[name]) for name in OF_2I} | {"gating": "interleaved"}
    names = tuple(name for name in floating(inputs) if name not in ("hidden_states", "gate_up_lora_A"))
    for name, value in run(in_turn, grad_output, names, save=save).items():
        wanted = interleaved(expected[name]) if name in OF_2I else expected[name]
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("gating", OTHER_GATINGS)
@pytest.mark.parametrize("view", ["transposed", "strided"])
def test_views(isa, view, gating, dtype):
    for num_tokens in (3, 60):
        inputs = moe_inputs(T=num_tokens, H=72, I=40, E=3, K=2, dtype=dtype, gating=gating, bias=True)
        for name in ("gate_up_proj", "down_proj"):
            weight = inputs[name]
            strided = weight.repeat_interleave(2, dim=2)[..., ::2]
            inputs[name] = weight.mT.contiguous().mT if view == "transposed" else strided
        check_against_reference(inputs)


@pytest.mark.parametrize("name", ["int4", "mxfp4", "fp8_e4m3", "q6_k"])
@pytest.mark.parametrize("gating", OTHER_GATINGS)
def test_formats(isa, gating, name):
    for num_tokens in (3, 60):
        inputs = moe_inputs(T=num_tokens, H=256, I=256, E=3, K=2, lora_rank=3, bias=True, gating=gating)
        check_against_reference(in_format(inputs, name, 32 if name in ("int4", "mxfp4") else 0))


@pytest.mark.parametrize("gating", OTHER_GATINGS)
def test_integers(isa, gating):
    """The rows of a weight decide nothing about how activations are rounded."""
    inputs = moe_inputs(T=9, H=256, I=128, E=3, K=2, bias=True, gating=gating)
    inputs = in_format(inputs, "int8", 0)
    output = ktops.moe_sft(**inputs, compute="int8")
    assert 0 < relative_error(output, ktops.moe_sft(**densified(inputs))) < 0.02


@pytest.mark.parametrize("gating", ["concatenated", *OTHER_GATINGS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 6, 130])
def test_routes(isa, num_tokens, dtype, gating):
    sizes = {"T": num_tokens, "H": 40, "I": 24, "E": 5, "K": 3, "lora_rank": 4, "bias": True}
    for invalid_ids in (False, True):
        inputs = moe_inputs(**sizes, dtype=dtype, gating=gating, invalid_ids=invalid_ids)
        check_against_reference(inputs | {"reduce": False})


@pytest.mark.parametrize(
    ("num_tokens", "dtype"),
    [*((T, dtype) for T in (9, 3000) for dtype in DTYPES), (9000, torch.bfloat16)],
)
def test_the_weighted_sum_of_routes_is_the_output(isa, num_tokens, dtype):
    """The rows of 3000 tokens pass the caches; those of 9000 are kept for a part of the experts at a time."""
    inputs = moe_inputs(T=num_tokens, H=2048, I=32, E=3, K=2, dtype=dtype, bias=True, invalid_ids=True)
    routes = ktops.moe_sft(**inputs, reduce=False)
    summed = (routes.double() * inputs["topk_weights"].double()[..., None]).sum(1)
    assert relative_error(ktops.moe_sft(**inputs), summed) < forward_budget(dtype)
    outside = (inputs["topk_ids"] < 0) | (inputs["topk_ids"] >= 3)
    assert outside.any() and not routes[outside].any() and routes[~outside].any(-1).all()


def test_routes_need_no_routing_weights(isa):
    inputs = moe_inputs(T=9, H=16, I=8, E=4, K=2, lora_rank=2, bias=True) | {"reduce": False}
    grad_output = random_grad_output(inputs)
    expected = run(inputs, grad_output)
    assert not expected.pop("topk_weights").any(), "they have no influence"
    for name, value in run(inputs | {"topk_weights": None}, grad_output).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("gating", ["concatenated", *OTHER_GATINGS])
def test_any_number_of_threads(isa, gating):
    inputs = moe_inputs(T=70, H=96, I=150, E=6, K=3, lora_rank=4, routing="skewed", bias=True, gating=gating)
    inputs["reduce"] = False
    grad_output = random_grad_output(inputs)
    with threads(1):
        expected = run(inputs, grad_output)
    for num_threads in (2, 7):
        with threads(num_threads):
            for name, value in run(inputs, grad_output).items():
                assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("gating", OTHER_GATINGS)
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning a function")
def test_compiled_equals_eager(gating, reduce):
    inputs = require_grad(moe_inputs(T=4, H=8, I=6, E=3, K=2, lora_rank=2, bias=True, gating=gating))
    inputs |= (
        {"activation": "relu2"}
        if gating == "none"
        else {
            "activation": "swiglu_clamped",
            "activation_args": {"limit": 1.0},
        }
    )
    names = floating(inputs)
    torch._dynamo.reset()

    def function(inputs: dict) -> Tensor:
        return ktops.moe_sft(**inputs, reduce=reduce).square().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    leaves = [inputs[name] for name in names]
    actual, expected = (torch.autograd.grad(f(inputs), leaves) for f in (compiled, function))
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("gating", ["concatenated", *OTHER_GATINGS])
@pytest.mark.parametrize("reduce", [True, False])
def test_fake_results_have_the_shapes_of_real_ones(gating, reduce):
    inputs = moe_inputs(T=4, H=8, I=6, E=3, K=2, lora_rank=2, bias=True, gating=gating) | {"reduce": reduce}
    real = run(inputs, random_grad_output(inputs))
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in inputs.items()}
    fake = run(meta, random_grad_output(inputs).to("meta"))
    assert {name: x.shape for name, x in fake.items()} == {name: x.shape for name, x in real.items()}


@pytest.mark.parametrize("save", ["activations", "recompute"])
def test_flops_without_a_gate(save):
    def flops(gating: str) -> dict:
        inputs = require_grad(
            moe_inputs(T=4, H=8, I=6, E=3, K=2, lora_rank=2, gating=gating), *GRADIENTS[2:4]
        )
        with FlopCounterMode(display=False) as counter:
            ktops.moe_sft(**inputs, save=save).sum().backward()
        return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}

    product, lora = 2 * 4 * 2 * 8 * 6, 2 * 2 * (4 * 2) * (8 + 6)
    recomputed = product if save == "recompute" else 0
    assert flops("none") == {
        "kt.moe_sft_fwd": 2 * product + 2 * lora,
        "kt.moe_sft_bwd": 4 * product + 2 * lora + recomputed,
    }
    assert flops("interleaved") == flops("concatenated")
