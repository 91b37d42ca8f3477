"""ExpertWeight as an object, and in modules: state dict, devices, copies, errors."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import ktops
from ktops import ExpertWeight
from ktops.nn import KTExperts

E, H, I = 3, 64, 32  # noqa: E741
FORMATS = [("int4", 32), ("uint4", 32), ("fp8_e4m3", 128), ("q8_0", 0), ("bf16", 0)]


def make(name: str = "int4", group_size: int = 32, seed: int = 0) -> KTExperts:
    generator = torch.Generator().manual_seed(seed)
    dense = (torch.randn(E, 2 * I, H, generator=generator), torch.randn(E, H, I, generator=generator))
    return KTExperts.from_parameters(*(ktops.quantize(d, name, group_size=group_size) for d in dense))


def forward(experts: KTExperts) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    weights, ids = torch.randn(5, E, generator=generator).softmax(-1).topk(2)
    return experts(torch.randn(5, H, generator=generator), ids, weights)


@pytest.mark.parametrize("name,group_size", FORMATS)
def test_state_dict_round_trip(name, group_size):
    source, target = make(name, group_size), make(name, group_size, seed=9)
    assert not torch.equal(forward(source), forward(target))
    target.load_state_dict(load(save(source.state_dict())))
    assert torch.equal(forward(source), forward(target))
    assert target.gate_up_proj.format == name


def test_state_dict_of_two_formats_and_group_sizes():
    source, target = make("uint4", 32), make("uint4", 32, seed=9)
    source.down_proj, target.down_proj = make("int4", 0).down_proj, make("int4", 0, seed=9).down_proj
    target.load_state_dict(load(save(source.state_dict())))
    assert torch.equal(forward(source), forward(target))
    groups = [(weight.format, weight.group_size) for weight in (target.gate_up_proj, target.down_proj)]
    assert groups == [("uint4", 32), ("int4", 0)]


def test_loading_leaves_copies_and_files_as_they_are():
    experts = make()
    copied, expected = copy.deepcopy(experts), forward(experts)
    copied.load_state_dict(make(seed=9).state_dict())
    assert torch.equal(forward(experts), expected)
    assert torch.equal(forward(copied), forward(make(seed=9)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor[:, :-1], "weight must have shape"),
        (lambda tensor: tensor.float(), "weight must be torch.uint8"),
    ],
)
def test_wrong_tensors_of_a_state_dict(change, message):
    experts = make()
    state, expected = experts.state_dict(), forward(experts)
    state["down_proj.weight"] = change(state["down_proj.weight"])
    with pytest.raises(
        (ValueError, TypeError), match=f"ExpertWeight: down_proj in the state dict: {message}"
    ):
        experts.load_state_dict(state)
    assert torch.equal(forward(experts), expected)


def test_state_dict_of_another_format():
    state = make("int4", 32).state_dict()
    with pytest.raises((ValueError, RuntimeError), match=r"has another layout|size mismatch"):
        make("int8", 32).load_state_dict(state)


def test_same_state_dict_shapes_in_another_format():
    """int4 and mxfp4 store the same number of bytes; only the extra state distinguishes them."""
    weight = ktops.quantize(torch.randn(E, H, H), "int4", group_size=32)
    other = ExpertWeight("uint4", weight.shape, *weight.codes[:2], weight.scale.clone(), group_size=32)
    state = dict(weight.state_dict()) | {"zero": other.zero}
    with pytest.raises(ValueError, match=r"has another layout: expected .*'uint4'.* got .*'int4'"):
        other.load_state_dict(state)


def test_pickle_and_torch_save():
    experts = make()
    assert torch.equal(forward(pickle.loads(pickle.dumps(experts))), forward(experts))
    file = io.BytesIO()
    torch.save(experts, file)
    file.seek(0)
    assert torch.equal(forward(torch.load(file, weights_only=False)), forward(experts))


def test_deepcopy_shares_memory():
    experts = make()
    copied = copy.deepcopy(experts)
    assert copied.gate_up_proj is not experts.gate_up_proj
    for ours, theirs in zip(copied.gate_up_proj.codes, experts.gate_up_proj.codes, strict=True):
        assert ours is theirs or ours.data_ptr() == theirs.data_ptr()
    assert torch.equal(forward(copied), forward(experts))


def test_devices_and_dtypes_leave_the_codes():
    experts = make()
    codes = experts.gate_up_proj.codes
    experts.to("meta")
    assert experts.gate_up_proj.device.type == "cpu"
    assert experts.bfloat16().gate_up_proj.dtype == torch.bfloat16
    assert experts.double().gate_up_proj.dtype == torch.float64
    assert experts.half().gate_up_proj.dtype == torch.float16
    experts.to(torch.float8_e5m2)
    assert experts.gate_up_proj.dtype == torch.float16  # unchanged, as nothing computes in float8
    assert all(a is b for a, b in zip(experts.gate_up_proj.codes, codes, strict=True))
    assert experts.float().gate_up_proj.scale.dtype == torch.bfloat16


def test_no_parameters_and_no_gradient():
    experts = make()
    assert list(experts.parameters()) == []
    with pytest.raises(TypeError, match="gate_up_proj must be a Parameter to be reset, got an ExpertWeight"):
        experts.reset_parameters()


def test_extra_repr_says_the_format():
    text = str(make())
    assert "(gate_up_proj): ExpertWeight('int4', shape=[3, 64, 64], group_size=32" in text


def test_nbytes_are_those_of_the_format():
    weight = ktops.quantize(torch.randn(2, 128, 256), "int4", group_size=128)
    assert weight.nbytes == 2 * 128 * (256 // 2 + 2 * 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format": "int3"}, ValueError, r"format must be one of bf16, .*, got 'int3'"),
        ({"shape": (3, 64)}, ValueError, r"shape must be \[E, N, K\], got \[3, 64\]"),
        ({"shape": (3, 64, 66)}, ValueError, r"weight must have shape \[3, 64, 33\], got \[3, 64, 32\]"),
        ({"weight": torch.zeros(3, 64, 32)}, TypeError, r"weight must be torch.uint8, got torch.float32"),
        ({"scale": None}, ValueError, r"scale must be a tensor of shape \[3, 64, 2\], got None"),
        (
            {"scale": torch.ones(3, 64, 3)},
            ValueError,
            r"scale must have shape \[3, 64, 2\], got \[3, 64, 3\]",
        ),
        (
            {"scale": torch.ones(3, 64, 2).double()},
            TypeError,
            r"scale must be torch.float32 or .*, got torch.float64",
        ),
        ({"zero": torch.ones(3, 64, 2)}, ValueError, r"zero must be None for format 'int4', got a tensor"),
        (
            {"group_size": 20},
            ValueError,
            r"group_size must be one of 0, any multiple of 32 for format 'int4', got 20",
        ),
        ({"dtype": torch.float8_e5m2}, TypeError, r"dtype must be one of .*, got torch.float8_e5m2"),
    ],
)
def test_wrong_arguments(changes, error, message):
    given = {
        "format": "int4",
        "shape": (3, 64, 64),
        "weight": torch.zeros(3, 64, 32, dtype=torch.uint8),
        "scale": torch.ones(3, 64, 2),
        "zero": None,
        "group_size": 32,
    } | changes
    with pytest.raises(error, match=f"ExpertWeight: {message}"):
        ExpertWeight(**given)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: ktops.quantize(w, "q4_k"), ValueError, "rows of a multiple of 256 weights, got 64"),
        (
            lambda w: ktops.quantize(w, "mxfp4", group_size=64),
            ValueError,
            "group_size must be one of 32 for format",
        ),
        (
            lambda w: ktops.quantize(w, "int4", group_size=-1),
            ValueError,
            "group_size must be one of 0, any multiple of 32 for format 'int4', got -1",
        ),
        (
            lambda w: ktops.quantize(w, "int8", method="hqq"),
            ValueError,
            "method must be one of rtn, mse .*, got 'hqq'",
        ),
        (
            lambda w: ktops.quantize(w[0], "int8"),
            ValueError,
            r"weight must have shape \[E, N, K\], got \[64, 64\]",
        ),
        (
            lambda w: ktops.quantize(w.int(), "int8"),
            TypeError,
            "weight must have a floating-point dtype, got torch.int32",
        ),
        (lambda w: ktops.quantize(w[:0], "int8"), ValueError, "weight must have at least one expert"),
        (lambda w: ktops.quantize(w.repeat(1, 1, 4), "iq4_xs"), ValueError, "can be read but not written"),
    ],
)
def test_quantize_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(E, 64, 64))


def test_weights_are_a_submodule():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = make()

    keys = set(Block().state_dict())
    assert keys == {
        f"experts.{weight}.{tensor}"
        for weight in ("gate_up_proj", "down_proj")
        for tensor in ("weight", "scale", "_extra_state")
    }


def test_formats_that_errors_recommend_can_be_written():
    weight = torch.randn(1, 2, 256)
    for name in ktops.formats.names():
        if name in ktops.formats.names(written=True):
            assert ktops.quantize(weight, name).format == name
        else:
            with pytest.raises(ValueError, match="can be read but not written"):
                ktops.quantize(weight, name)
    with pytest.raises(ValueError, match="rows of a multiple of 32 weights") as raised:
        ktops.quantize(torch.randn(1, 2, 20), "q8_0")
    only_read = set(ktops.formats.names()) - set(ktops.formats.names(written=True))
    assert only_read == {"iq4_nl", "iq4_xs"}
    assert not [name for name in only_read if name in str(raised.value)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ktops.formats.names(written=True))
def test_codes_cannot_hold_what_is_not_finite(name, value):
    weight = torch.ones(1, 32, 256)
    weight[0, 3, 5] = value
    if name in ("bf16", "fp16", "fp32"):
        assert torch.equal(ktops.quantize(weight, name).dequantize().isfinite(), weight.isfinite())
        return
    with pytest.raises(
        ValueError, match=f"quantize: format '{name}' needs finite weights, got NaN or infinity"
    ):
        ktops.quantize(weight, name)
