"""kt::moe_fwd_streamed: the experts are copied to the device in portions and multiplied there."""

import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from simulated.conftest import fake, inputs, on_device
from streams import World
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ktops import reference
from ktops.devices import grouped, portions, staging, transfer
from ktops.formats import get_format
from ktops.ops.arguments import TENSORS
from ktops.ops.check_devices import LORA
from ktops.testing.activations import ACTIVATION_CASES, away_from_kinks
from ktops.testing.budgets import forward_budget, relative_error
from ktops.testing.compare import assert_matches_reference
from ktops.testing.inputs import densified, op_arguments, upcast
from ktops.testing.simulated_device import SimulatedTensor, traffic
from ktops.testing.weights import random_weight, variants

pytestmark = pytest.mark.usefixtures("single_thread")

SIZES = {"T": 12, "H": 64, "I": 32, "E": 6, "K": 2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EXPERTS = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")


def many(**options) -> dict:
    return inputs(**{**SIZES, **options})


def streamed(given: dict, portion_bytes: int, *names: str) -> torch.Tensor:
    """Runs the operator with tokens, routes and the named tensors on the device; returns a CPU tensor."""
    arguments = op_arguments(on_device(given, *names))
    output = torch.ops.kt.moe_fwd_streamed(*arguments, portion_bytes)
    assert output.device == arguments.hidden_states.device
    return output.cpu()


def check(given: dict, portion_bytes: int, *names: str) -> None:
    expected = reference.moe_fwd(op_arguments(upcast(densified(given))))
    dtype, size = given["hidden_states"].dtype, max(given["down_proj"].shape[1:])
    assert relative_error(streamed(given, portion_bytes, *names), expected) <= forward_budget(dtype, size)


PORTIONS = [1, 60_000, 1 << 30]
"""Bytes of portions: one expert and one row at a time, several of each, and everything at once."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense(device, dtype):
    given = many(dtype=dtype)
    grad_output = torch.zeros_like(given["hidden_states"])
    for portion_bytes in PORTIONS:
        assert_matches_reference({"output": streamed(given, portion_bytes)}, given, grad_output)


@pytest.mark.parametrize("name,group_size", variants(256))
def test_formats(device, name, group_size):
    given = many(T=6, H=256, I=256, E=3, dtype=torch.bfloat16)
    for weight in ("gate_up_proj", "down_proj"):
        given[weight] = random_weight(given[weight].float(), name, group_size)
        given[weight].dtype = torch.bfloat16
    check(given, 1 << 21)


@pytest.mark.parametrize("case", ACTIVATION_CASES, ids=str)
def test_activations(device, case):
    given = away_from_kinks(many(gating=case.gating)) | case.options
    check(given, 60_000)


@pytest.mark.parametrize("routing", ["skewed", "one_expert", "empty_experts", "repeated"])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_routes(device, routing, ids_dtype):
    given = many(routing=routing, ids_dtype=ids_dtype, invalid_ids=True)
    for portion_bytes in PORTIONS:
        check(given, portion_bytes)


@pytest.mark.parametrize("moved", [(), LORA, LORA[::3]], ids=["host", "device", "some"])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_factors_anywhere(device, moved, lora_dtype):
    check(many(dtype=torch.bfloat16, lora_dtype=lora_dtype), 60_000, *moved)


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("options", [{"T": 0}, {"T": 1}, {"lora_rank": 0, "bias": False}])
def test_few_tokens_and_arguments(device, options, reduce):
    check(many(invalid_ids=True, **options) | {"reduce": reduce}, 60_000)


def test_transposed_weights(device):
    given = many(dtype=torch.bfloat16)
    for name in ("gate_up_proj", "down_proj"):
        given[name] = given[name].mT.contiguous().mT
    check(given, 60_000)


@pytest.mark.parametrize("lora_rank,each", [((8, 16), 6), ((3, 5), 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_mm(device, monkeypatch, lora_rank, each, transposed):
    """As on a GPU whose products torch groups; operands that are not aligned are multiplied one by one."""
    calls = []
    grouped_mm = torch.nn.functional.grouped_mm
    monkeypatch.setattr(grouped, "has_grouped_mm", lambda rows, weight: grouped.is_aligned(weight))
    monkeypatch.setattr(grouped.F, "grouped_mm", lambda *a, **k: calls.append(a) or grouped_mm(*a, **k))
    given = many(dtype=torch.bfloat16, lora_rank=lora_rank, invalid_ids=True)
    if transposed:
        given |= {name: given[name].mT.contiguous().mT for name in ("gate_up_proj", "down_proj")}
    for portion_bytes in PORTIONS:
        check(given, portion_bytes)
    assert calls and len(calls) % each == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_with_float32_results(device, monkeypatch, dtype):
    """As on a GPU without grouped kernels."""
    results = []

    def mm(rows, weight, *, out_dtype):
        operands = (x.data_on_host.to("meta") for x in (rows, weight))
        results.append(aten_mm(*operands, out_dtype=out_dtype))
        return torch.bmm(rows[None].to(out_dtype), weight[None].to(out_dtype))[0]

    aten_mm = torch.ops.aten.mm
    monkeypatch.setattr(grouped, "has_grouped_mm", lambda rows, weight: False)
    monkeypatch.setattr(grouped, "_is_nvidia", lambda device: True)
    monkeypatch.setattr(grouped.torch, "mm", mm)
    check(many(dtype=dtype, invalid_ids=True), 60_000)
    assert results and all(result.dtype == torch.float32 for result in results)


def test_integers_are_decoded(device):
    given = with_formats(many())
    assert torch.equal(streamed(given | {"compute": "int8"}, 60_000), streamed(given, 60_000))


def test_through_pinned_memory(device, monkeypatch):
    """As on a GPU, whose copies overlap with its work; ``test_portions.py`` checks their order."""
    pinned = []
    for module in (portions, transfer):
        monkeypatch.setattr(module, "PINNED", (device.type,))
        monkeypatch.setattr(module, "staging", staging.Staging())
    monkeypatch.setattr(staging, "pinned", lambda n: pinned.append(n) or torch.empty(n, dtype=torch.uint8))
    World(monkeypatch, 0)
    for portion_bytes in PORTIONS:
        check(with_formats(many(invalid_ids=True)), portion_bytes)
    assert pinned


def with_formats(given: dict) -> dict:
    """Returns the same with weights in formats with scales and zero points."""
    return given | {
        "gate_up_proj": random_weight(given["gate_up_proj"].float(), "uint4", 32),
        "down_proj": random_weight(given["down_proj"].float(), "int8", 0),
    }


@pytest.mark.parametrize("change", [dict, with_formats])
@pytest.mark.parametrize("moved", [(), LORA], ids=["host", "device"])
@pytest.mark.parametrize(
    "routing,portion_bytes", [("random", 1), ("random", 1 << 30), ("empty_experts", 60_000)]
)
def test_traffic(device, change, moved, routing, portion_bytes):
    """Experts with tokens go up once, each with 4 bytes of offset; the offsets of all come down."""
    given = change(many(routing=routing, lora_dtype=torch.bfloat16))
    arguments = op_arguments(on_device(given, *moved))
    tensors = [getattr(arguments, name) for name in TENSORS]
    of_experts = [x for x in tensors if x is not None and x.device.type == "cpu"]
    used = len(given["topk_ids"].unique())
    with traffic() as moves:
        torch.ops.kt.moe_fwd_streamed(*arguments, portion_bytes)
    assert moves["down"] == 4 * (SIZES["E"] + 1) and moves["copies_down"] == 1
    assert moves["up"] == used * (4 + sum(x[0].nbytes for x in of_experts))


def test_runs_of_experts_are_copied_at_once(device):
    given = inputs(T=1, E=7, K=5) | {"topk_ids": torch.tensor([[0, 2, 3, 5, 6]])}
    arguments = op_arguments(on_device(given))
    with traffic() as moves:
        torch.ops.kt.moe_fwd_streamed(*arguments, 1 << 30)
    assert moves["copies_up"] == 1 + 3 * 8  # the ends of groups, and 8 tensors


@contextmanager
def memory_on_the_device(monkeypatch) -> Iterator[list[int]]:
    """Records the bytes of all storages on the device whenever a tensor is made there."""
    alive: dict[int, int] = {}
    recorded = []
    new = SimulatedTensor.__new__

    def counted(cls, data):
        storage = data.untyped_storage()
        if storage.data_ptr() not in alive:
            alive[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(storage, alive.pop, storage.data_ptr())
        recorded.append(sum(alive.values()))
        return new(cls, data)

    with monkeypatch.context() as patch:
        patch.setattr(SimulatedTensor, "__new__", counted)
        yield recorded


@pytest.mark.parametrize("name", ["dense", "uint4", "fp8_e4m3", "mxfp4", "q4_k"])
def test_memory_on_the_device(device, monkeypatch, name):
    """Two portions, and what decoding takes, not the layer."""
    given = inputs(T=2, H=256, I=256, E=24, K=24, dtype=torch.bfloat16, lora_rank=0, bias=False)
    expert = 3 * 256 * 256 * 2
    if name != "dense":
        expert *= 3
        for weight in ("gate_up_proj", "down_proj"):
            given[weight] = random_weight(given[weight].float(), name, get_format(name).default_group_size)
    arguments = op_arguments(on_device(given))
    portion_bytes = 2 * expert
    with memory_on_the_device(monkeypatch) as used:
        torch.ops.kt.moe_fwd_streamed(*arguments, portion_bytes)
    assert portion_bytes < max(used) < (2.2 if name == "dense" else 3) * portion_bytes


@pytest.mark.parametrize("argument", EXPERTS)
def test_experts_on_the_device_are_an_error(device, argument):
    message = rf"{argument} must be on cpu \(hidden_states is on simgpu:0\), got simgpu:0"
    with pytest.raises(RuntimeError, match=message):
        streamed(many(), 1, argument)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"topk_ids": torch.zeros(9, 2).long()}, "must have shape [num_tokens=12, top_k], got [9, 2]"),
        ({"topk_ids": torch.zeros(12).long()}, "topk_ids must have shape [num_tokens=12, top_k], got [12]"),
        ({"topk_weights": torch.zeros(13, 2)}, "must have shape [num_tokens=12, top_k=2], got [13, 2]"),
        ({"topk_weights": torch.zeros(12, 3)}, "must have shape [num_tokens=12, top_k=2], got [12, 3]"),
        ({"hidden_states": torch.zeros(64)}, "must have shape [num_tokens, hidden_size], got [64]"),
        ({"hidden_states": torch.zeros(12, 63)}, "gate_up_proj must have shape"),
        ({"gate_up_lora_A": torch.zeros(6, 3, 63)}, "gate_up_lora_A must have shape"),
        ({"activation": "tanh"}, "activation must be one of"),
    ],
)
def test_errors_name_the_argument(device, options, message):
    with traffic() as moves, pytest.raises(RuntimeError, match=re.escape(message)):
        streamed(many() | options, 1, *(name for name in LORA if name in options))
    assert not moves["copies_down"]


def test_no_gradient(device):
    given = on_device(many())
    given["hidden_states"].requires_grad_()
    output = torch.ops.kt.moe_fwd_streamed(*op_arguments(given), 1)
    with pytest.raises(RuntimeError, match="moe_fwd_streamed is for inference and has no gradient"):
        output.sum().backward()


@pytest.mark.parametrize("reduce", [True, False])
def test_fake_kernel_describes_the_real_one(device, reduce):
    operator = torch.ops.kt.moe_fwd_streamed.default
    arguments = *op_arguments(on_device(many(dtype=torch.bfloat16) | {"reduce": reduce})), 60_000
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_autograd_registration"))
    with FakeTensorMode():
        traced = operator(*map(fake, arguments))
    output = operator(*arguments)
    for what in ("device", "dtype", "shape"):
        assert getattr(traced, what) == getattr(output, what), what
    assert traced.stride() == output.stride()
    with FakeTensorMode(), pytest.raises(RuntimeError, match="down_proj must be on cpu"):
        operator(*map(fake, op_arguments(on_device(many(), "down_proj"))), 1)


def test_flops(device):
    arguments = op_arguments(on_device(many()))
    with FlopCounterMode(display=False) as expected:
        torch.ops.kt.moe_fwd(*arguments)
    with FlopCounterMode(display=False) as counted:
        torch.ops.kt.moe_fwd_streamed(*arguments, 60_000)
    assert counted.get_total_flops() == expected.get_total_flops() > 0
