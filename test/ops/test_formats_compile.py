"""Weights in formats under torch.compile, torch.export, opcheck and checkpointing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ktops
from ktops.ops.arguments import GRADIENTS
from ktops.testing.compare import random_grad_output
from ktops.testing.inputs import moe_inputs, op_arguments, require_grad
from ktops.testing.weights import in_format, random_weight

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning a function"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]
FORMATS = [("uint4", 32), ("fp8_e4m3", 0), ("q4_0", 0)]
LEAVES = ("hidden_states", "gate_up_lora_A", "down_lora_B")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(name: str, group_size: int) -> tuple[torch.nn.Module, dict]:
    inputs = moe_inputs(T=5, H=64, I=32, E=3, K=2, lora_rank=2)
    weights = [random_weight(inputs.pop(key), name, group_size) for key in ("gate_up_proj", "down_proj")]
    return ktops.nn.KTExperts.from_parameters(*weights), inputs


def results(function, inputs: dict) -> list[torch.Tensor]:
    inputs = {
        k: v.detach().requires_grad_(k in LEAVES) if torch.is_tensor(v) else v for k, v in inputs.items()
    }
    given = dict(inputs)
    x, ids, weights = (given.pop(name) for name in ("hidden_states", "topk_ids", "topk_weights"))
    output = function(x, ids, weights, **given)
    output.backward(random_grad_output(inputs))
    return [output.detach(), *(inputs[name].grad for name in LEAVES)]


@pytest.mark.parametrize("name,group_size", FORMATS)
def test_compiled_equals_eager(name, group_size):
    experts, inputs = make(name, group_size)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(results(compiled, inputs), results(experts, inputs), strict=True):
        assert torch.equal(actual, expected)


def test_checkpointed_equals_plain():
    experts, inputs = make("uint4", 32)

    def recomputed(*args, **kwargs):
        return checkpoint(experts, *args, use_reentrant=False, **kwargs)

    for actual, expected in zip(results(recomputed, inputs), results(experts, inputs), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name,group_size", FORMATS)
def test_exported(name, group_size):
    experts, inputs = make(name, group_size)
    args = tuple(inputs[key] for key in ("hidden_states", "topk_ids", "topk_weights"))
    program = torch.export.export(experts, args)
    with torch.no_grad():
        assert torch.equal(program.module()(*args), experts(*args))


@pytest.mark.parametrize("name,group_size", FORMATS)
def test_opcheck(name, group_size):
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "fp8_e4m3":
        utils = utils[
            1:
        ]  # PyTorch's schema test compares tensors with arithmetic that float8 does not support
    inputs = in_format(moe_inputs(T=5, H=64, I=32, E=3, K=2, lora_rank=2), name, group_size)
    gate_up = inputs["gate_up_proj"]
    decoding = (*gate_up.codes, name, group_size, gate_up.shape[-1])
    torch.library.opcheck(torch.ops.kt.dequantize.default, decoding, test_utils=utils)
    torch.library.opcheck(torch.ops.kt.moe_fwd.default, op_arguments(inputs), test_utils=utils)
    for given in (inputs, require_grad(inputs, "hidden_states")):
        arguments = (*op_arguments(given), "activations")
        torch.library.opcheck(torch.ops.kt.moe_sft_fwd.default, arguments, test_utils=utils)


def test_no_gradient_of_codes():
    inputs = in_format(moe_inputs(T=5, H=64, I=32, E=3, K=2), "int4", 32)
    arguments = (*op_arguments(inputs), "activations")
    output, *saved, _, _, _ = torch.ops.kt.moe_sft_fwd(*arguments)
    for prefix in ("gate_up", "down"):
        mask = 1 << GRADIENTS.index(f"{prefix}_proj")
        message = f"must not ask for the gradient of {prefix}_proj, whose {prefix}_format is not dense"
        with pytest.raises(RuntimeError, match=message):
            torch.ops.kt.moe_sft_bwd(output, *arguments, *saved, mask)


@pytest.mark.parametrize("prefix,intermediate_size", [("gate_up", 32), ("down", 64)])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": None}, "PREFIX_scale must be given for PREFIX_format 'int4', got None"),
        (
            {"scale": torch.ones(3, 64, 5)},
            r"PREFIX_scale must have shape \[num_experts=3, rows=64, groups=2\]",
        ),
        (
            {"scale": torch.ones(3, 64, 2).double()},
            "PREFIX_scale must be float32, bfloat16 or float16, got float64",
        ),
        ({"scale": torch.ones(3, 64, 4)[..., ::2]}, "PREFIX_scale must be contiguous in its last dimension"),
        ({"zero": torch.ones(3, 64, 2)}, "PREFIX_zero must be None for PREFIX_format 'int4', got a tensor"),
        ({"proj": torch.zeros(3, 64, 32)}, "PREFIX_proj must be uint8, got float32"),
        (
            {"proj": torch.zeros(3, 64, 31, dtype=torch.uint8)},
            r"PREFIX_proj must have shape \[.*columns/2=32\]",
        ),
        (
            {"proj": torch.zeros(3, 64, 64, dtype=torch.uint8)[..., ::2]},
            "PREFIX_proj must be contiguous in its",
        ),
        ({"format": "int5"}, "PREFIX_format must be one of dense, bf16, .*, got 'int5'"),
        (
            {"format": "q4_k", "group_size": 0, "scale": None},
            "PREFIX_proj in format 'q4_k' must have rows of a multiple of 256 weights, got 64",
        ),
        ({"format": "mxfp4"}, "PREFIX_scale must be uint8, got bfloat16"),
        (
            {"group_size": 48},
            "PREFIX_group_size must be 0 or a multiple of 32 for PREFIX_format 'int4', got 48",
        ),
    ],
)
def test_errors(prefix, intermediate_size, changes, message):
    """The projection has 3 experts, 64 rows and 64 columns."""
    inputs = in_format(moe_inputs(T=5, H=64, I=intermediate_size, E=3, K=2), "int4", 32)
    changes = {f"{prefix}_{name}": value for name, value in changes.items()}
    message = message.replace("PREFIX", prefix)
    with pytest.raises(RuntimeError, match=f"kt::moe_fwd: {message}"):
        torch.ops.kt.moe_fwd(*op_arguments(inputs, **changes))
