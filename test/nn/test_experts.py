"""KTExperts behaves like any other module."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import ktops
from ktops.nn import KTExperts
from ktops.nn.experts import DTYPES
from ktops.ops.activation import ACTIVATIONS
from ktops.testing.budgets import forward_budget, gradient_budget, relative_error
from ktops.testing.counts import counted

E, H, I, K, T = 4, 16, 8, 2, 6  # noqa: E741


def make(**options) -> KTExperts:
    torch.manual_seed(0)
    return KTExperts(E, H, I, **options)


def inputs(*leading: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*(leading or (T,)), H, generator=generator)
    weights, ids = torch.rand(*x.shape[:-1], E, generator=generator).topk(K)
    return x.to(dtype).requires_grad_(), ids, weights


def reference(experts: KTExperts, x, ids, weights):
    """Runs every expert on every token and selects the routes, in plain PyTorch."""
    up = torch.einsum("...h,eih->...ei", x, experts.gate_up_proj)
    if experts.gate_up_proj_bias is not None:
        up = up + experts.gate_up_proj_bias
    gate, up = up.chunk(2, dim=-1)
    activation = getattr(torch.nn.functional, experts.function.activation)
    hidden = activation(gate) * up
    down = torch.einsum("...ei,ehi->...eh", hidden, experts.down_proj)
    if experts.down_proj_bias is not None:
        down = down + experts.down_proj_bias
    dense = torch.zeros(*x.shape[:-1], E).scatter(-1, ids, weights)
    return (dense[..., None] * down).sum(-2)


def assert_same(actual, expected):
    """Asserts that two float32 results are each within a budget of the exact one."""
    assert relative_error(actual, expected) < 2 * gradient_budget(torch.float32, inner_size=H)


CLAMPED = {"activation": "swiglu_clamped"}
OPTIONS = [{}, {"bias": True}, {"activation": "gelu"}, {"save": "recompute"}]


@pytest.mark.parametrize("leading", [(T,), (2, 3), (2, 1, 3), (0,)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_output_and_gradients(leading, options):
    experts = make(**options)
    x, ids, weights = inputs(*leading)
    expected = reference(experts, x, ids, weights)
    actual = experts(x, ids, weights)
    assert actual.shape == x.shape
    assert_same(actual, expected)
    tensors = [x, *experts.parameters()]
    grad = torch.randn_like(expected)
    gradients = [torch.autograd.grad(output, tensors, grad) for output in (actual, expected)]
    for pair in zip(*gradients, strict=True):
        assert_same(*pair)


@pytest.mark.parametrize("outside", [-1, E])
def test_routes_outside_contribute_nothing_after_a_norm(outside):
    """Also if the norm of 0 is not 0."""
    norm = torch.nn.LayerNorm(H)
    torch.nn.init.ones_(norm.bias)
    experts = make(post_expert_norm=norm)
    x, ids, weights = inputs()
    expected = experts(x, ids[:, :1], weights[:, :1])
    ids[:, 1] = outside
    weights.requires_grad_()
    output = experts(x, ids, weights)
    assert_same(output, expected)
    output.sum().backward()
    assert not weights.grad[:, 1].any()


def test_parameters_are_shared_not_copied():
    source = make(bias=True)
    parameters = dict(source.named_parameters())
    experts = KTExperts.from_parameters(**parameters, activation="gelu", save="recompute")
    for name, parameter in source.named_parameters():
        assert getattr(experts, name) is parameter
    assert (experts.num_experts, experts.hidden_size, experts.intermediate_size) == (E, H, I)
    assert (experts.function.activation, experts.save) == ("gelu", "recompute")


def test_state_dict_keys():
    assert list(make().state_dict()) == ["gate_up_proj", "down_proj"]
    assert list(make(bias=True).state_dict()) == [
        "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias",
    ]  # fmt: skip


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_independent(clone):
    experts = make(bias=True)
    copied = clone(experts)
    arguments = inputs()
    assert torch.equal(copied(*arguments), experts(*arguments))
    with torch.no_grad():
        copied.down_proj.zero_()
    assert not torch.equal(copied(*arguments), experts(*arguments))


def test_a_module_pickled_before_streaming():
    experts, arguments = make(), inputs()
    del experts.__dict__["stream_min_tokens"]
    loaded = pickle.loads(pickle.dumps(experts))
    assert torch.equal(loaded(*arguments), make()(*arguments)) and "stream" not in repr(loaded)
    assert loaded.options["stream_min_tokens"] is None


def test_state_dict_round_trip():
    experts, other = make(), KTExperts(E, H, I)
    other.load_state_dict(experts.state_dict())
    arguments = inputs()
    assert torch.equal(other(*arguments), experts(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_runs_in_the_dtype_of_the_weights(dtype, input_dtype):
    experts = make().to(dtype)
    x, ids, weights = inputs(dtype=input_dtype)
    actual = experts(x, ids, weights.to(input_dtype))
    actual.sum().backward()
    assert actual.dtype == x.grad.dtype == input_dtype
    assert experts.down_proj.grad.dtype == dtype
    expected = reference(make(), x.detach().float(), ids, weights.to(input_dtype).float())
    coarsest = max(dtype, input_dtype, key=lambda dtype: torch.finfo(dtype).eps)
    assert relative_error(actual, expected) < forward_budget(coarsest, inner_size=H)


def test_parameters_start_as_in_linear():
    experts = KTExperts(3, 400, 100, bias=True)
    for name, fan_in in (("gate_up_proj", 400), ("gate_up_proj_bias", 400), ("down_proj", 100)):
        parameter = getattr(experts, name).detach()
        assert parameter.abs().max() <= fan_in**-0.5
        assert parameter.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)


def test_no_gradient_runs_the_inference_op(monkeypatch):
    experts, called = make(), []
    monkeypatch.setattr(torch.ops.kt, "moe_fwd", lambda *args: called.append(1) or args[0])
    with torch.no_grad():
        experts(*inputs())
    assert called


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    torch._dynamo.reset()
    counter = CompileCounter()
    experts = make()
    compiled = torch.compile(experts, fullgraph=True, backend=counter, dynamic=dynamic)
    for tokens in (5, 7, 9) if dynamic else (5, 5):
        x, ids, weights = inputs(tokens)
        actual, expected = compiled(x, ids, weights), experts(x, ids, weights)
        assert_same(actual, expected)
        pair = [torch.autograd.grad(y.sum(), experts.down_proj)[0] for y in (actual, expected)]
        assert_same(*pair)
    assert counter.frame_count == 1


def test_repr():
    text = "num_experts=4, hidden_size=16, intermediate_size=8, bias=False, activation='silu'"
    assert repr(make()) == f"KTExperts({text})"
    assert make(save="recompute").extra_repr() == f"{text}, save='recompute'"


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "num_experts must be positive, got 0", {"num_experts": 0}),
        (ValueError, "hidden_size must be positive, got -1", {"hidden_size": -1}),
        (
            ValueError,
            f"activation must be one of {', '.join(ACTIVATIONS)}, got 'elu'",
            {"activation": "elu"},
        ),
        (ValueError, "save must be one of activations, recompute, got 'all'", {"save": "all"}),
        (ValueError, r"activation_args must be \[limit\] .*, got 0 values", {"activation": "swiglu_step"}),
        (ValueError, "activation_args must have .*, got no limit", {**CLAMPED, "activation_args": {}}),
        (ValueError, ".* a positive limit .*, got -1", {**CLAMPED, "activation_args": {"limit": -1}}),
        (
            ValueError,
            "activation_args must be a sequence or a mapping, got 7",
            {**CLAMPED, "activation_args": 7},
        ),
        (ValueError, ".*'List.float.' for argument 'activation_args'", {**CLAMPED, "activation_args": "700"}),
        (
            ValueError,
            "activation must be a function of the gate for gating 'none'",
            {**CLAMPED, "activation_args": {"limit": 1}, "gating": "none"},
        ),
        (TypeError, "dtype must have one of the dtypes .*, got torch.int32", {"dtype": torch.int32}),
    ],
)
def test_constructor_errors(error, message, options):
    sizes = {"num_experts": E, "hidden_size": H, "intermediate_size": I}
    with pytest.raises(error, match=f"KTExperts: {message}"):
        KTExperts(**{**sizes, **options})


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"gate_up_proj must have shape \[4, 16, 16\], got", {"gate_up_proj": (E, I, H)}),
        (ValueError, r"down_proj must have shape \[E, H, I\], got \[16, 8\]", {"down_proj": (H, I)}),
        (ValueError, r"down_proj_bias must have shape \[4, 16\], got", {"down_proj_bias": (E, I)}),
        (TypeError, "down_proj must have the dtype of gate_up_proj", {"down_proj": torch.float64}),
        (TypeError, "gate_up_proj must have one of the dtypes", {"gate_up_proj": torch.float8_e5m2}),
    ],
)
def test_from_parameters_errors(error, message, change):
    parameters = dict(make(bias=True).named_parameters())
    for name, value in change.items():
        old = parameters[name].detach()
        tensor = old.new_zeros(value) if isinstance(value, tuple) else old.to(value)
        parameters[name] = torch.nn.Parameter(tensor)
    with pytest.raises(error, match=f"KTExperts: {message}"):
        KTExperts.from_parameters(**parameters)


def test_cast_to_an_unsupported_dtype():
    with pytest.raises(TypeError, match=r"gate_up_proj must have one of the dtypes .* torch\.float8_e5m2"):
        make().to(torch.float8_e5m2)(*inputs())


def test_autocast_to_float16_with_a_scaled_loss():
    """Without the GradScaler, the gradient of this loss would be 0 in float16."""
    x, ids, weights = inputs()
    experts, exact, router = make(), make().double(), torch.nn.Linear(H, H, bias=False)
    torch.nn.init.eye_(router.weight)
    optimizer = torch.optim.SGD(experts.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    with torch.autocast("cpu", torch.float16):
        hidden = router(x)
        output = experts(hidden, ids, weights)
        assert hidden.dtype == output.dtype == torch.float16
    scaler.scale(output.float().sum() * 1e-9).backward()
    scaler.unscale_(optimizer)
    exact(x.detach().double(), ids, weights).sum().backward()
    for ours, theirs in zip(experts.parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert relative_error(ours.grad, theirs.grad * 1e-9) < gradient_budget(torch.float16, inner_size=H)


def test_is_exported():
    assert ktops.nn.KTExperts is KTExperts


def test_integers_are_for_inference(monkeypatch):
    """In training mode "auto" is "bf16", with and without gradients."""
    from ktops.nn import experts as module
    from ktops.nn import prepared

    weights = [ktops.quantize(torch.randn(E, *shape), "int8") for shape in ((2 * I, H), (H, I))]
    experts = KTExperts.from_parameters(*weights)
    seen = []

    def watch(owner, name: str) -> None:
        run = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, **kw: (seen.append(kw["compute"]), run(*args, **kw))[1]
        )

    watch(module, "moe_sft")
    watch(prepared, "moe_arguments")
    with torch.no_grad():
        experts.train()(*inputs())
        experts.eval()(*inputs())
    experts.compute = "int8"
    experts.train()(*inputs())
    assert seen == ["bf16", "auto", "int8"]


@pytest.mark.parametrize("leading", [(T,), (2, T)])
def test_a_call_adds_views_and_no_copies_to_the_operator(leading):
    experts, (x, ids, weights) = make(), inputs(*leading)
    with torch.no_grad(), counted() as counts:
        output = experts(x, ids, weights)
    assert counts.allocations == [output.nbytes] and counts.operators["kt::moe_fwd"] == 1
    assert counts.operators.total() <= 14, counts.operators
