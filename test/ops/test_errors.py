"""For invalid arguments, the error names the operator, the argument, what it must be and what it is."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch

import ktops
from ktops.ops.activation import ACTIVATIONS
from ktops.ops.arguments import GRADIENTS
from ktops.testing.inputs import moe_inputs, op_arguments, require_grad

OPS = ["moe_fwd", "moe_sft_fwd", "moe_sft_bwd"]
SAVED = ("saved_gate_up", "saved_xa", "saved_ha")
T, H, I, E, K, R1, R2 = 5, 8, 6, 3, 2, 2, 4  # noqa: E741


def valid() -> dict:
    return moe_inputs(T=T, H=H, I=I, E=E, K=K, lora_rank=(R1, R2), bias=True)


def call(op: str, **changes):
    """Calls the operator with valid arguments, some replaced; for backward, saved tensors stay valid."""
    save = changes.pop("save", "activations")
    own = {name: changes.pop(name) for name in ("grad_output", *SAVED, "grad_mask") if name in changes}
    arguments = op_arguments(valid() | changes)
    if op == "moe_fwd":
        return torch.ops.kt.moe_fwd(*arguments)
    if op == "moe_sft_fwd":
        return torch.ops.kt.moe_sft_fwd(*arguments, save)
    output, *saved, _, _, _ = torch.ops.kt.moe_sft_fwd(*op_arguments(valid()), "activations")
    own = {"grad_output": output, "grad_mask": 1} | dict(zip(SAVED, saved, strict=True)) | own
    saved = (own[name] for name in SAVED)
    return torch.ops.kt.moe_sft_bwd(own["grad_output"], *arguments, save, *saved, own["grad_mask"])


def raises(op: str, argument: str, must: str, got: object):
    """Expects ``kt::<op>: <argument> must <must>, got <got>``; ``must`` is a pattern, ``got`` is literal."""
    return pytest.raises(RuntimeError, match=rf"kt::{op}: {argument} must {must}, got {re.escape(str(got))}")


WRONG_SHAPES = [
    ("hidden_states", (H,), r"\[num_tokens, hidden_size\]"),
    ("hidden_states", (T, H, 1), r"\[num_tokens, hidden_size\]"),
    ("topk_ids", (T,), rf"\[num_tokens={T}, top_k\]"),
    ("topk_ids", (T + 1, K), rf"\[num_tokens={T}, top_k\]"),
    ("topk_weights", (T, K + 1), rf"\[num_tokens={T}, top_k={K}\]"),
    ("topk_weights", (T - 1, K), rf"\[num_tokens={T}, top_k={K}\]"),
    ("gate_up_proj", (E, 2 * I - 1, H), None),
    ("gate_up_proj", (E, 2 * I, H + 1), None),
    ("gate_up_proj", (E + 1, 2 * I, H), None),
    ("gate_up_proj", (2 * I, H), None),
    ("down_proj", (E, H - 1, I), None),
    ("down_proj", (E, H, I + 1), None),
    ("down_proj", (E + 1, H, I), None),
    ("down_proj", (E * H, I), None),
    ("gate_up_bias", (E, I), None),
    ("gate_up_bias", (2 * I,), None),
    ("down_bias", (E + 1, H), None),
    ("down_bias", (E, H, 1), None),
    ("gate_up_lora_A", (E, R1, H + 1), None),
    ("gate_up_lora_A", (R1, H), None),
    ("gate_up_lora_B", (E, 2 * I, R1 + 1), None),
    ("gate_up_lora_B", (E, I, R1), None),
    ("down_lora_A", (E + 1, R2, I), None),
    ("down_lora_A", (E, R2, I - 1), None),
    ("down_lora_B", (E, H, R2 - 1), None),
    ("down_lora_B", (E, H + 1, R2), None),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("argument,shape,expected", WRONG_SHAPES)
def test_wrong_shape(op, argument, shape, expected):
    wrong = torch.zeros(shape, dtype=valid()[argument].dtype)
    sizes = {"num_experts": E, "intermediate_size": I}
    with raises(op, argument, f"have shape {expected or '.*'}", list(shape)):
        call(op, **{argument: wrong}, **sizes)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("argument", GRADIENTS)
@pytest.mark.parametrize(
    "dtype,name", [(torch.uint8, "uint8"), (torch.int32, "int32"), (torch.complex64, "")]
)
def test_wrong_dtype(op, argument, dtype, name):
    with raises(op, argument, "be .*float32.*", name):
        call(op, **{argument: valid()[argument].to(dtype)})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("argument", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("dtype,name", [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_weights_in_another_dtype_than_hidden_states(op, argument, dtype, name):
    with raises(op, argument, "be float32 like hidden_states", name):
        call(op, **{argument: valid()[argument].to(dtype)})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "dtype,name", [(torch.float32, "float32"), (torch.int16, "int16"), (torch.bool, "bool")]
)
def test_wrong_dtype_of_ids(op, dtype, name):
    with raises(op, "topk_ids", "be int32 or int64", name):
        call(op, topk_ids=valid()["topk_ids"].to(dtype))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("argument", ["topk_ids", *GRADIENTS])
def test_one_argument_on_another_device(op, argument):
    with pytest.raises(RuntimeError, match=rf"kt::{op}: {argument} must be on cpu, got meta"):
        call(op, **{argument: valid()[argument].to("meta")})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("argument", ["gate_up_scaling", "down_scaling"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_scaling(op, argument, value):
    with raises(op, argument, "be finite", value):
        call(op, **{argument: value})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", ["elu", "", "SiLU"])
def test_unknown_activation(op, value):
    with raises(op, "activation", f"be one of {', '.join(ACTIVATIONS)}", f"'{value}'"):
        call(op, activation=value)


@pytest.mark.parametrize("op", OPS[1:])
def test_unknown_save(op):
    with raises(op, "save", ".*activations.*recompute.*", "'everything'"):
        call(op, save="everything")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("argument", ["gate_up_format", "down_format"])
def test_unknown_format(op, argument):
    with raises(op, argument, ".*dense.*", "'int3'"):
        call(op, **{argument: "int3"})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("argument", ["gate_up_scale", "gate_up_zero", "down_scale", "down_zero"])
def test_scales_of_dense_weights(op, argument):
    with pytest.raises(RuntimeError, match=rf"kt::{op}: {argument} must .*dense"):
        call(op, **{argument: torch.ones(E)})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("prefix", ["gate_up", "down"])
def test_group_size_of_dense_weights(op, prefix):
    with raises(op, f"{prefix}_group_size", f"be 0 for {prefix}_format 'dense'", 32):
        call(op, **{f"{prefix}_group_size": 32})


def test_the_largest_group_size():
    """Sums that include this group size would overflow."""
    codes, scale = torch.zeros(1, 4, 128, dtype=torch.int8), torch.ones(1, 4, 1)
    with raises("dequantize", "scale", ".*groups=1]", [1, 4, 0]):
        torch.ops.kt.dequantize(codes, scale[:, :, :0], None, "int8", 2**63 - 32, 128)
    assert torch.ops.kt.dequantize(codes, scale, None, "int8", 2**63 - 32, 128).eq(0).all()


@pytest.mark.parametrize("op", OPS)
def test_arguments_of_an_activation_that_takes_none(op):
    with raises(op, "activation_args", r"be \[\] for activation 'silu'", 1):
        call(op, activation_args=[7.0])


CLAMPED = "have a positive limit for activation 'swiglu_clamped'"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("args", "expected", "actual"),
    [
        ([], r"be \[limit, alpha, offset\] for activation 'swiglu_clamped'", "0 values"),
        ([7.0, 1.0, 0.0, 0.0], r"be \[limit, alpha, offset\] for activation 'swiglu_clamped'", "4 values"),
        ([0.0, 1.0, 0.0], CLAMPED, 0.0),
        ([-7.0, 1.0, 0.0], CLAMPED, -7.0),
        ([math.nan, 1.0, 0.0], "be finite", math.nan),
        ([7.0, math.inf, 0.0], "be finite", math.inf),
    ],
)
def test_wrong_arguments_of_an_activation(op, args, expected, actual):
    with raises(op, "activation_args", expected, actual):
        call(op, activation="swiglu_clamped", activation_args=args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"limits": 7.0}, "must have limit, alpha, offset for activation 'swiglu_clamped', got 'limits'"),
        ({"alpha": 7.0}, "must have limit, alpha, offset for activation 'swiglu_clamped', got no limit"),
    ],
)
def test_wrong_names_of_arguments_of_an_activation(args, message):
    with pytest.raises(RuntimeError, match=f"ktops.moe_sft: activation_args {message}"):
        ktops.moe_sft(**valid(), activation="swiglu_clamped", activation_args=args)


@pytest.mark.parametrize("op", OPS)
def test_unknown_gating(op):
    with raises(op, "gating", "be one of concatenated, interleaved, none", "'swapped'"):
        call(op, gating="swapped")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("activation", [name for name, known in ACTIVATIONS.items() if not known.of_gate])
def test_activation_of_both_halves_without_a_gate(op, activation):
    inputs = moe_inputs(T=T, H=H, I=I, E=E, K=K, lora_rank=(R1, R2), bias=True, gating="none")
    args = [1.0] * len(ACTIVATIONS[activation].parameters)
    with raises(op, "activation", "be a function of the gate for gating 'none'", f"'{activation}'"):
        call(op, **inputs, activation=activation, activation_args=args)


@pytest.mark.parametrize("op", OPS)
def test_gate_that_contradicts_the_shape(op):
    with raises(
        op,
        "gate_up_proj",
        r"have shape \[num_experts=\d, intermediate_size=\d+, .*",
        [E, 2 * I, H],
    ):
        call(op, gating="none")


def test_no_routing_weights():
    with pytest.raises(RuntimeError, match="topk_weights must be a tensor with reduce=True, got None"):
        ktops.moe_sft(**valid() | {"topk_weights": None})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("prefix", ["gate_up", "down"])
@pytest.mark.parametrize("given,missing", ["AB", "BA"])
def test_half_an_adapter(op, prefix, given, missing):
    message = rf"kt::{op}: {prefix}_lora_{missing} must be given together with {prefix}_lora_{given}"
    with pytest.raises(RuntimeError, match=message):
        call(op, **{f"{prefix}_lora_{missing}": None})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("prefix,sizes", [("gate_up", (H, 2 * I)), ("down", (I, H))])
def test_rank_zero(op, prefix, sizes):
    shapes = {f"{prefix}_lora_A": (E, 0, sizes[0]), f"{prefix}_lora_B": (E, sizes[1], 0)}
    with raises(op, f"{prefix}_lora_A", "have a rank of at least 1", f"shape {[E, 0, sizes[0]]}"):
        call(op, **{name: torch.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("op", OPS)
def test_no_experts(op):
    empty = {name: valid()[name][:0] for name in GRADIENTS if name not in ("hidden_states", "topk_weights")}
    with raises(op, "num_experts", "be at least 1", 0):
        call(op, **empty)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("argument,value", [("num_experts", -1), ("intermediate_size", -1)])
def test_negative_sizes(op, argument, value):
    with raises(op, argument, ".*", value):
        call(op, **{argument: value})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "argument,value,expected",
    [("num_experts", E + 1, f"num_experts={E + 1}"), ("intermediate_size", I + 1, f"={2 * (I + 1)}")],
)
def test_sizes_that_contradict_the_weights(op, argument, value, expected):
    with raises(op, "gate_up_proj", rf"have shape \[.*{expected}.*\]", [E, 2 * I, H]):
        call(op, **{argument: value})


def test_no_tokens_and_no_slots_are_fine():
    inputs = moe_inputs(T=0, H=H, I=I, E=E, K=K, lora_rank=2, bias=True)
    assert ktops.moe_sft(**inputs).shape == (0, H)
    inputs = valid() | {"topk_ids": torch.zeros(T, 0, dtype=torch.int64), "topk_weights": torch.zeros(T, 0)}
    assert torch.equal(ktops.moe_sft(**inputs), torch.zeros(T, H))
    output = ktops.moe_sft(**require_grad(inputs))
    assert torch.equal(output, torch.zeros(T, H))
    output.sum().backward()


@pytest.mark.parametrize("shape", [(T, H + 1), (T + 1, H), (T * H,)])
def test_wrong_shape_of_grad_output(shape):
    with raises(
        "moe_sft_bwd", "grad_output", rf"have shape \[num_tokens={T}, hidden_size={H}\]", list(shape)
    ):
        call("moe_sft_bwd", grad_output=torch.zeros(shape))


def test_wrong_dtype_of_grad_output():
    with raises("moe_sft_bwd", "grad_output", ".*", "float64"):
        call("moe_sft_bwd", grad_output=torch.zeros(T, H, dtype=torch.float64))


@pytest.mark.parametrize(
    "argument,shape",
    [
        ("saved_gate_up", (T * K - 1, 2 * I)),
        ("saved_gate_up", (0, 2 * I)),
        ("saved_xa", (T * K, R1 + 1)),
        ("saved_ha", (T * K + 1, R2)),
        ("saved_ha", (R2,)),
    ],
)
def test_wrong_shape_of_saved_tensors(argument, shape):
    with raises("moe_sft_bwd", argument, "have shape .*", list(shape)):
        call("moe_sft_bwd", **{argument: torch.zeros(shape)})


@pytest.mark.parametrize("argument", SAVED)
def test_wrong_dtype_of_saved_tensors(argument):
    columns = dict(zip(SAVED, (2 * I, R1, R2), strict=True))
    with raises("moe_sft_bwd", argument, ".*", "float64"):
        call("moe_sft_bwd", **{argument: torch.zeros(T * K, columns[argument], dtype=torch.float64)})


@pytest.mark.parametrize("grad_mask", [1 << len(GRADIENTS), -1])
def test_unknown_gradients(grad_mask):
    with raises("moe_sft_bwd", "grad_mask", ".*", grad_mask):
        call("moe_sft_bwd", grad_mask=grad_mask)


@pytest.mark.parametrize("name", ["gate_up_bias", "down_bias"])
def test_gradient_of_an_absent_tensor(name):
    with pytest.raises(RuntimeError, match=rf"kt::moe_sft_bwd: grad_mask must .*{name}"):
        call("moe_sft_bwd", grad_mask=1 << GRADIENTS.index(name), **{name: None})


def test_public_function_passes_the_errors_on():
    for inputs, op in ((valid(), "moe_fwd"), (require_grad(valid()), "moe_sft_fwd")):
        with raises(op, "activation", ".*", "'elu'"):
            ktops.moe_sft(**inputs, activation="elu")
        with raises(op, "topk_ids", "have shape .*", [T - 1, K]):
            ktops.moe_sft(**inputs | {"topk_ids": inputs["topk_ids"][1:]})
    with pytest.raises(TypeError, match="gate_up_lora_C"):
        ktops.moe_sft(**valid(), gate_up_lora_C=None)


def test_unknown_isa():
    before = ktops.cpu_capability()
    rows = ", ".join(ktops.cpu_capabilities())
    with pytest.raises(RuntimeError, match=rf"one of {rows}, got 'sse9'"), ktops.use_isa("sse9"):
        raise AssertionError("not reached")
    assert ktops.cpu_capability() == before


def test_isa_that_this_cpu_lacks():
    before = ktops.cpu_capability()
    for name, supported in ktops.cpu_capabilities().items():
        if not supported:
            with pytest.raises(RuntimeError, match=rf"{name}"), ktops.use_isa(name):
                raise AssertionError("not reached")
    assert ktops.cpu_capability() == before


def test_use_isa_restores_after_an_error():
    before = ktops.cpu_capability()
    with pytest.raises(ZeroDivisionError), ktops.use_isa("scalar"):
        assert ktops.cpu_capability() == "scalar"
        raise ZeroDivisionError
    assert ktops.cpu_capability() == before


@pytest.mark.parametrize("isa,expected", [("scalar", r"^scalar\n"), ("sse9", r"KTOPS_ISA.*got 'sse9'")])
def test_isa_from_the_environment(isa, expected, tmp_path):
    """The variable is read at the first use; an unknown value is an error that names the variable."""
    code = "import ktops; print(ktops.cpu_capability())"
    env = os.environ | {"KTOPS_ISA": isa}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode == 0) == (isa == "scalar")
    assert re.search(expected, result.stdout + result.stderr), result.stderr
