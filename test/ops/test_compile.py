"""torch.compile, torch.export, checkpointing and the FLOP counter see the operators as operators."""

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ktops
from ktops.ops.arguments import GRADIENTS, TENSORS
from ktops.testing.compare import random_grad_output, run
from ktops.testing.inputs import floating, moe_inputs, op_arguments, require_grad

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning a function"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def case(num_tokens: int = 4, **options) -> dict:
    return moe_inputs(T=num_tokens, H=8, I=6, E=3, K=2, **{"lora_rank": (2, 1), "bias": True} | options)


def layer(inputs: dict) -> torch.Tensor:
    """Runs the operator between two others, as in a model."""
    x = inputs["hidden_states"]
    return x + 2 * ktops.moe_sft(**inputs | {"hidden_states": x.sin()})


def results(function, inputs: dict) -> list[torch.Tensor]:
    leaves = require_grad(inputs)
    output = function(leaves)
    output.backward(random_grad_output(inputs))
    return [output.detach(), *(leaves[name].grad for name in floating(inputs))]


def assert_bitwise(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_equals_eager(isa, dtype):
    inputs = case(dtype=dtype)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_bitwise(results(compiled, inputs), results(layer, inputs))
    with torch.no_grad():
        assert torch.equal(compiled(inputs), layer(inputs))


def test_compiled_with_inductor():
    inputs = case()
    compiled = torch.compile(layer, fullgraph=True)
    for actual, expected in zip(results(compiled, inputs), results(layer, inputs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_no_recompilation_for_other_numbers_of_tokens():
    """Checks calls after the first, which may compile twice if Dynamo restarts to specialize the scalings."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for num_tokens in (4, 9, 33, 2):
        inputs = case(num_tokens)
        assert_bitwise(results(compiled, inputs), results(layer, inputs))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 4


def test_named_arguments_of_an_activation():
    """Dynamo sees symbols in place of the numbers."""

    def clamped(inputs: dict, limit: float) -> torch.Tensor:
        args = {"limit": limit, "offset": 1.0}
        return layer(inputs | {"activation": "swiglu_clamped", "activation_args": args})

    compiled = torch.compile(clamped, backend="aot_eager", fullgraph=True, dynamic=True)
    inputs = case()
    for limit in (1.0, 0.5):
        assert torch.equal(compiled(inputs, limit), clamped(inputs, limit))


def test_dynamic_tokens_by_mark():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for num_tokens in (5, 3, 17):
        inputs = case(num_tokens)
        for name in ("hidden_states", "topk_ids", "topk_weights"):
            torch._dynamo.mark_dynamic(inputs[name], 0)
        assert torch.equal(compiled(inputs), layer(inputs))
    assert counter.frame_count == 1


def test_no_graph_break():
    explanation = torch._dynamo.explain(layer)(require_grad(case()))
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


def describe(graph: torch.fx.GraphModule) -> str:
    """Returns the operators of a graph, those of kt with one line per argument."""

    def text(value) -> str:
        if isinstance(value, torch.fx.Node):
            meta = value.meta["val"]
            return f"{str(meta.dtype).removeprefix('torch.')}{list(meta.shape)}"
        return repr(value)

    lines = []
    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            lines.append(schema.name)
            if schema.name.startswith("kt::"):
                named = zip((argument.name for argument in schema.arguments), node.args, strict=True)
                lines += [f"  {name} {text(value)}" for name, value in named if value is not None]
    return "\n".join(lines)


INPUTS = """\
  hidden_states float32[4, 8]
  topk_ids int64[4, 2]
  topk_weights float32[4, 2]
  gate_up_proj float32[3, 12, 8]
  down_proj float32[3, 8, 6]"""
LORA = """\
  gate_up_lora_A float32[3, 2, 8]
  gate_up_lora_B float32[3, 12, 2]
  down_lora_A float32[3, 1, 6]
  down_lora_B float32[3, 8, 1]"""
ATTRIBUTES = "\n".join(
    f"  {name} {value!r}" for name, value in op_arguments(case())._asdict().items() if name not in TENSORS
)


def test_graphs_of_lora_training():
    backend = AotEagerAndRecordGraphs()
    inputs = require_grad(case(bias=False), "hidden_states", "gate_up_lora_A", "gate_up_lora_B")
    torch.compile(layer, backend=backend, fullgraph=True)(inputs).sum().backward()
    (forward,), (backward,) = backend.fw_graphs, backend.bw_graphs
    assert describe(forward) == (
        f"""\
aten::sin
kt::moe_sft_fwd
{INPUTS}
{LORA}
{ATTRIBUTES}
  save 'activations'
aten::mul
aten::add"""
    )
    assert describe(backward) == (
        f"""\
aten::mul
kt::moe_sft_bwd
  grad_output float32[4, 8]
{INPUTS}
{LORA}
{ATTRIBUTES}
  save 'activations'
  saved_gate_up float32[8, 12]
  saved_xa float32[8, 2]
  saved_ha float32[8, 1]
  grad_mask 193
aten::cos
aten::mul
aten::add"""
    )


def test_graph_of_inference():
    backend = AotEagerAndRecordGraphs()
    with torch.no_grad():
        torch.compile(layer, backend=backend, fullgraph=True)(case(lora_rank=0, bias=False))
    (graph,) = backend.fw_graphs
    assert describe(graph) == (
        f"""\
aten::sin
kt::moe_fwd
{INPUTS}
{ATTRIBUTES}
aten::mul
aten::add"""
    )


class Layer(torch.nn.Module):
    """Router and experts."""

    def __init__(self):
        super().__init__()
        inputs = case()
        self.router = torch.nn.Linear(8, 3)
        self.names = [n for n in floating(inputs) if n not in ("hidden_states", "topk_weights")]
        for name in self.names:
            setattr(self, name, torch.nn.Parameter(inputs[name]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        return x + ktops.moe_sft(x, ids, weights, **{name: getattr(self, name) for name in self.names})


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_export_with_any_number_of_tokens(training, strict):
    torch.manual_seed(0)
    module = Layer()
    tokens = {"x": {0: torch.export.Dim("tokens", min=2)}}
    with torch.set_grad_enabled(training):
        program = torch.export.export(module, (torch.randn(4, 8),), dynamic_shapes=tokens, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("kt.")]
    assert targets == (["kt.moe_sft_fwd.default"] if training else ["kt.moe_fwd.default"])
    for num_tokens in (2, 7, 33):
        x = torch.randn(num_tokens, 8)
        assert torch.equal(program.module()(x), module(x))


class CountForwards(TorchDispatchMode):
    """Counts the experts' forwards that run, not those restored from a checkpoint."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.kt.moe_fwd.default, torch.ops.kt.moe_sft_fwd.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options,forwards",
    [
        ({"use_reentrant": True}, 2),
        ({"use_reentrant": False}, 2),
        ({"use_reentrant": False, "context_fn": ktops.checkpoint_context_fn}, 1),
    ],
)
def test_checkpoint(options, forwards):
    torch.manual_seed(0)
    module, x = Layer(), torch.randn(5, 8, requires_grad=True)
    tensors = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x).sum(), tensors)
    with CountForwards() as counter:
        checkpoint(module, x, **options).sum().backward()
    assert counter.count == forwards
    assert_bitwise([tensor.grad for tensor in tensors], expected)


def flops(function) -> dict:
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


def test_flops():
    """T=4, K=2, H=8, I=6 make 8 routes; a multiply-add has 2 FLOPs."""
    base = 8 * 2 * (8 * 12 + 6 * 8)
    lora = 8 * 2 * (2 * (8 + 12) + 1 * (6 + 8))
    inputs = case(bias=False)
    plain = case(bias=False, lora_rank=0)
    assert flops(lambda: ktops.moe_sft(**plain)) == {"kt.moe_fwd": base}
    assert flops(lambda: ktops.moe_sft(**inputs)) == {"kt.moe_fwd": base + lora}

    def step(inputs, *names):
        return flops(lambda: ktops.moe_sft(**require_grad(inputs, *names)).sum().backward())

    assert step(plain, "hidden_states") == {"kt.moe_sft_fwd": base, "kt.moe_sft_bwd": base}
    adapters = ("hidden_states", *(name for name in GRADIENTS if "lora" in name))
    assert step(inputs, *adapters) == {"kt.moe_sft_fwd": base + lora, "kt.moe_sft_bwd": base + 2 * lora}
    weights = ("hidden_states", "gate_up_proj", "down_proj")
    assert step(plain, *weights) == {"kt.moe_sft_fwd": base, "kt.moe_sft_bwd": 2 * base}


def test_meta_tensors_give_shapes():
    inputs = {name: x.to("meta") if torch.is_tensor(x) else x for name, x in case(7).items()}
    output, gate_up, xa, ha, *host = torch.ops.kt.moe_sft_fwd(*op_arguments(inputs), "activations")
    assert (output.shape, gate_up.shape, xa.shape, ha.shape) == ((7, 8), (14, 12), (14, 2), (14, 1))
    assert output.device.type == "meta" and host == [None] * 3
    assert ktops.moe_sft(**inputs).shape == (7, 8)


def test_eager_results_of_the_layer():
    """Computes the layer of this file with only the operator."""
    inputs = case()
    inner = inputs | {"hidden_states": inputs["hidden_states"].sin()}
    grad_output = random_grad_output(inputs)
    expected = run(inner, 2 * grad_output)
    x = inputs["hidden_states"]
    actual = results(layer, inputs)
    torch.testing.assert_close(actual[0], x + 2 * expected["output"])
    torch.testing.assert_close(actual[1], grad_output + expected["hidden_states"] * x.cos())
