"""The registered operators and autograd."""

import pytest
import torch

import ktops
from ktops.ops.arguments import GRADIENTS
from ktops.testing.activations import ACTIVATION_CASES
from ktops.testing.compare import random_grad_output, run, run_reference
from ktops.testing.inputs import floating, moe_inputs, op_arguments, require_grad

ALL_GRADIENTS = (1 << len(GRADIENTS)) - 1


def tiny(dtype=torch.float64, **options) -> dict:
    return moe_inputs(T=3, H=4, I=3, E=3, K=2, dtype=dtype, lora_rank=(2, 1), bias=True, **options)


def assert_bitwise(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("activation", ACTIVATION_CASES, ids=str)
def test_gradcheck(isa, activation):
    save = "recompute" if activation.gating == "interleaved" else "activations"
    inputs = require_grad(tiny(gating=activation.gating, scale=2.0)) | activation.options
    names = floating(inputs)

    def function(*tensors):
        return ktops.moe_sft(**inputs | dict(zip(names, tensors, strict=True)), save=save)

    fast = activation.activation != "silu"
    assert torch.autograd.gradcheck(function, [inputs[name] for name in names], fast_mode=fast)


@pytest.mark.parametrize("routing", ["repeated", "one_expert", "empty_experts"])
def test_gradcheck_of_routings(isa, routing):
    inputs = require_grad(tiny(routing=routing, invalid_ids=True))
    names = floating(inputs)

    def function(*tensors):
        return ktops.moe_sft(**inputs | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names], fast_mode=True)


def test_double_backward_raises():
    inputs = require_grad(tiny())
    output = ktops.moe_sft(**inputs)
    (gradient,) = torch.autograd.grad(output.sum(), inputs["hidden_states"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"kt::moe_sft_bwd has no derivative.*double backward"):
        gradient.sum().backward()


def test_backward_of_inference_raises():
    inputs = require_grad(tiny())
    output = torch.ops.kt.moe_fwd(*op_arguments(inputs))
    with pytest.raises(RuntimeError, match=r"kt::moe_fwd is for inference and has no gradient"):
        output.sum().backward()


def test_saved_tensors_carry_no_gradient(isa):
    output, *saved, _, _, _ = torch.ops.kt.moe_sft_fwd(*op_arguments(require_grad(tiny())), "activations")
    assert output.requires_grad
    assert not any(t.requires_grad for t in saved)


@pytest.mark.parametrize("name", GRADIENTS)
def test_only_the_asked_gradient(isa, name):
    inputs = tiny(torch.float32)
    grad_output = random_grad_output(inputs)
    leaves = require_grad(inputs, name)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ktops.moe_sft(**leaves).backward(grad_output)
    assert [e.name for e in profile.events() if e.name.startswith("kt::")].count("kt::moe_sft_bwd") == 1
    assert torch.equal(leaves[name].grad, run(inputs, grad_output)[name])
    assert all(leaves[other].grad is None for other in floating(inputs) if other != name)


def test_grad_mask_follows_requires_grad(isa):
    masks = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.kt.moe_sft_bwd.default:
                *_, grad_mask = args
                masks.append(grad_mask)
            return func(*args, **(kwargs or {}))

    for names in (("hidden_states",), ("down_lora_B", "topk_weights"), floating(tiny())):
        output = ktops.moe_sft(**require_grad(tiny(), *names))
        with Spy():
            output.sum().backward()
        assert masks.pop() == sum(1 << GRADIENTS.index(name) for name in names)


def test_two_forwards_before_two_backwards(isa):
    first, second = (tiny(torch.bfloat16, seed=seed) for seed in (0, 1))
    second |= {name: first[name] for name in GRADIENTS[2:]}
    grad_output = random_grad_output(first)
    expected = [run(inputs, grad_output) for inputs in (first, second)]
    for order in ((0, 1), (1, 0)):
        leaves = [require_grad(first), require_grad(second)]
        outputs = [ktops.moe_sft(**inputs) for inputs in leaves]
        for i in order:
            outputs[i].backward(grad_output)
        for inputs, results in zip(leaves, expected, strict=True):
            assert_bitwise([inputs[n].grad for n in floating(inputs)], [results[n] for n in floating(inputs)])


def test_backward_twice_through_a_retained_graph(isa):
    leaves = require_grad(tiny(torch.float32))
    output = ktops.moe_sft(**leaves)
    tensors = [leaves[name] for name in floating(leaves)]
    first = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    assert_bitwise(torch.autograd.grad(output.sum(), tensors), first)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_accumulation(isa, set_to_none):
    inputs = tiny(torch.float32)
    grad_output = random_grad_output(inputs)
    expected = run(inputs, grad_output)
    leaves = require_grad(inputs)
    optimizer = torch.optim.SGD([leaves[name] for name in floating(leaves)], lr=0.0)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=set_to_none)
        for _ in range(3):
            ktops.moe_sft(**leaves).backward(grad_output)
        for name in floating(leaves):
            single = expected[name]
            assert torch.equal(leaves[name].grad, single + single + single), name


def test_a_changed_input_is_noticed(isa):
    leaves = require_grad(tiny())
    output = ktops.moe_sft(**leaves)
    with torch.no_grad():
        leaves["gate_up_lora_A"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


class NoGradient(torch.autograd.Function):
    """An identity function whose gradient is undefined."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_an_undefined_gradient_passes_through(isa):
    leaves = require_grad(tiny())
    NoGradient.apply(ktops.moe_sft(**leaves)).sum().backward()
    assert all(leaves[name].grad is None for name in floating(leaves))


def test_a_chain_of_two_layers(isa):
    """Gradients pass through a layer into the one below it."""
    inputs = tiny()
    lower = require_grad(inputs, "hidden_states", "gate_up_lora_A")
    middle = ktops.moe_sft(**lower)
    output = ktops.moe_sft(**require_grad(inputs, "down_proj") | {"hidden_states": middle})
    grad_output = random_grad_output(inputs)
    gradient = torch.autograd.grad(output, lower["hidden_states"], grad_output)[0]
    upper = run_reference(inputs | {"hidden_states": middle.detach()}, grad_output)
    expected = run_reference(inputs, upper["hidden_states"])["hidden_states"]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("save", ["activations", "recompute"])
def test_opcheck_forward(save, with_grad, dtype):
    inputs = tiny(dtype)
    inputs = require_grad(inputs) if with_grad else inputs
    torch.library.opcheck(torch.ops.kt.moe_sft_fwd.default, (*op_arguments(inputs), save))


@pytest.mark.parametrize("names", [("hidden_states",), ("gate_up_lora_A", "down_lora_B"), ("gate_up_proj",)])
def test_opcheck_forward_with_some_gradients(names):
    inputs = require_grad(tiny(torch.float32), *names)
    torch.library.opcheck(torch.ops.kt.moe_sft_fwd.default, (*op_arguments(inputs), "activations"))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_opcheck_inference(lora_rank):
    inputs = moe_inputs(T=3, H=4, I=3, E=3, K=2, lora_rank=lora_rank)
    arguments = op_arguments(inputs)
    torch.library.opcheck(torch.ops.kt.moe_fwd.default, arguments)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = op_arguments(require_grad(inputs))
    torch.library.opcheck(torch.ops.kt.moe_fwd.default, arguments, test_utils=tests)


@pytest.mark.parametrize("grad_mask", [0, 1, 0b1111000000, ALL_GRADIENTS])
@pytest.mark.parametrize("save", ["activations", "recompute"])
def test_opcheck_backward(save, grad_mask):
    arguments = (*op_arguments(tiny(torch.float32)), save)
    output, *saved, _, _, _ = torch.ops.kt.moe_sft_fwd(*arguments)
    backward = torch.ops.kt.moe_sft_bwd.default
    torch.library.opcheck(backward, (torch.ones_like(output), *arguments, *saved, grad_mask))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_fake_kernels_describe_the_real_ones(isa, layout):
    """Shapes, dtypes and strides of every result, also for transposed arguments."""
    inputs = tiny(torch.bfloat16)
    if layout == "transposed":
        inputs = {
            name: value.transpose(-1, -2).contiguous().transpose(-1, -2) if torch.is_tensor(value) else value
            for name, value in inputs.items()
        }
    arguments = op_arguments(inputs)
    output, *saved, _, _, _ = torch.ops.kt.moe_sft_fwd(*arguments, "activations")
    grads = torch.ops.kt.moe_sft_bwd(output, *arguments, "activations", *saved, ALL_GRADIENTS)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake_output, *fake_saved, _, _, _ = torch.ops.kt.moe_sft_fwd(*arguments, "activations")
        fake_grads = torch.ops.kt.moe_sft_bwd(
            fake_output, *arguments, "activations", *fake_saved, ALL_GRADIENTS
        )
        fake_inference = torch.ops.kt.moe_fwd(*arguments)
    real, fake = (output, *saved, *grads), (fake_output, *fake_saved, *fake_grads)
    for expected, actual in zip((*real, output), (*fake, fake_inference), strict=True):
        assert (actual.shape, actual.dtype, actual.stride()) == (
            expected.shape,
            expected.dtype,
            expected.stride(),
        )
