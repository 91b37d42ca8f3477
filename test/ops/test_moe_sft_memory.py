"""Results do not depend on the addresses and strides of the arguments or on earlier contents of memory."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import ktops
from ktops.ops.arguments import GRADIENTS
from ktops.testing.compare import random_grad_output, run
from ktops.testing.inputs import moe_inputs, require_grad

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


def innermost_first(t: Tensor) -> Tensor:
    """Returns the same values with the first dimension innermost, as PEFT stores the experts of lora_B."""
    return t.permute(*range(1, t.ndim), 0).contiguous().permute(-1, *range(t.ndim - 1))


def transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_other(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), -77, dtype=t.dtype)
    wide[..., 1::2] = t
    return wide[..., 1::2]


def padded_rows(t: Tensor) -> Tensor:
    """Returns a copy with contiguous rows in a wider storage, starting at an odd element."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), -77, dtype=t.dtype)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


LAYOUTS = [innermost_first, transposed, every_other, padded_rows]
ARGUMENTS = (*GRADIENTS, "topk_ids", "grad_output")
WEIGHTS = ("gate_up_proj", "down_proj")


@pytest.fixture(params=DTYPES)
def case(request, isa):
    inputs = moe_inputs(T=9, H=24, I=20, E=4, K=2, dtype=request.param, lora_rank=(3, 4), bias=True)
    grad_output = random_grad_output(inputs)
    return inputs, grad_output, run(inputs, grad_output)


def assert_same(actual: dict, expected: dict) -> None:
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name
        assert value.is_contiguous(), name


def changed(inputs: dict, grad_output: Tensor, layout, *names: str) -> dict[str, Tensor]:
    """Runs with the named arguments in a layout; test_transposed_weights.py covers transposed weights."""
    tensors = inputs | {"grad_output": grad_output}
    tensors |= {
        name: layout(tensors[name]) for name in names if layout is not transposed or name not in WEIGHTS
    }
    return run({name: tensors[name] for name in inputs}, tensors["grad_output"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_strides_of_one_argument(case, layout, name):
    inputs, grad_output, expected = case
    assert_same(changed(inputs, grad_output, layout, name), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_all_arguments(case, layout):
    inputs, grad_output, expected = case
    assert_same(changed(inputs, grad_output, layout, *ARGUMENTS), expected)


def test_adapters_as_peft_stores_them(case):
    """lora_A.weight [r E, in] has the expert outermost, lora_B.weight [out, r E] has it innermost."""
    inputs, grad_output, expected = case
    for prefix in ("gate_up", "down"):
        a, b = inputs[f"{prefix}_lora_A"], inputs[f"{prefix}_lora_B"]
        num_experts, rank, _ = a.shape
        weight = b.permute(1, 2, 0).reshape(-1, rank * num_experts)
        inputs[f"{prefix}_lora_A"] = a.reshape(rank * num_experts, -1).view(num_experts, rank, -1)
        inputs[f"{prefix}_lora_B"] = weight.view(-1, rank, num_experts).permute(2, 0, 1)
        assert inputs[f"{prefix}_lora_B"].stride(0) == 1
    assert_same(run(inputs, grad_output), expected)


def test_expanded_arguments(isa):
    inputs = moe_inputs(T=9, H=24, I=20, E=4, K=2, dtype=torch.bfloat16, lora_rank=3, bias=True)
    for name in ("hidden_states", "topk_weights", "topk_ids"):
        inputs[name] = inputs[name][:1].expand(9, -1)
    for name in ("gate_up_proj", "down_lora_B", "gate_up_bias"):
        inputs[name] = inputs[name][:1].expand(4, *inputs[name].shape[1:])
    grad_output = torch.ones((), dtype=torch.bfloat16).expand(9, 24)
    dense = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    assert_same(run(inputs, grad_output), run(dense, grad_output.contiguous()))


def test_gradient_of_a_sum_has_no_strides(isa):
    inputs = moe_inputs(T=9, H=24, I=20, E=4, K=2, lora_rank=3)
    leaves = require_grad(inputs)
    ktops.moe_sft(**leaves).sum().backward()
    expected = run(inputs, torch.ones(9, 24))
    for name in ("hidden_states", "topk_weights", "gate_up_lora_B"):
        assert torch.equal(leaves[name].grad, expected[name])


def map_read_only(path, tensor: Tensor, offset: int) -> Tensor:
    """Returns the tensor in a read-only mapped file, offset bytes from a page boundary."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    path.write_bytes(b"\xff" * offset + data)
    mapped = np.memmap(path, mode="r", offset=offset, shape=(len(data),))
    return torch.from_numpy(mapped).view(tensor.dtype).view(tensor.shape)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 34])
def test_weights_in_a_read_only_map_of_any_alignment(case, tmp_path, offset):
    inputs, grad_output, expected = case
    mapped = {
        name: map_read_only(tmp_path / name, inputs[name], offset)
        for name in GRADIENTS
        if name not in ("hidden_states", "topk_weights")
    }
    assert mapped["down_proj"].data_ptr() % 64 == offset
    assert_same(run(inputs | mapped, grad_output), expected)


def test_weights_in_a_safetensors_file(case, tmp_path):
    inputs, grad_output, expected = case
    names = ("gate_up_proj", "down_proj", "gate_up_bias")
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(
        {"odd": torch.zeros(1, dtype=torch.uint8)} | {n: inputs[n] for n in names}, file
    )
    loaded = safetensors.torch.load_file(file)
    assert_same(run(inputs | {name: loaded[name] for name in names}, grad_output), expected)


def test_weights_from_a_shared_file(case, tmp_path):
    inputs, grad_output, expected = case
    weight = inputs["gate_up_proj"]
    (tmp_path / "w").write_bytes(weight.view(torch.uint8).numpy().tobytes())
    shared = torch.from_file(str(tmp_path / "w"), shared=True, size=weight.numel(), dtype=weight.dtype)
    assert_same(run(inputs | {"gate_up_proj": shared.view(weight.shape)}, grad_output), expected)


def test_arguments_are_not_written(case):
    inputs, grad_output, _ = case
    tensors = {k: v for k, v in (inputs | {"grad_output": grad_output}).items() if isinstance(v, Tensor)}
    copies = {name: value.clone() for name, value in tensors.items()}
    versions = {name: value._version for name, value in tensors.items()}
    run(inputs, grad_output)
    for name, value in tensors.items():
        assert torch.equal(value, copies[name]) and value._version == versions[name], name


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_left_from_earlier_calls(isa, dtype):
    """A larger layer full of NaN runs before the same layer again; kept workspaces must not leak values."""
    inputs = moe_inputs(T=9, H=24, I=20, E=4, K=2, dtype=dtype, lora_rank=3, bias=True, invalid_ids=True)
    grad_output = random_grad_output(inputs)
    expected = {save: run(inputs, grad_output, save=save) for save in ("activations", "recompute")}
    spoiled = moe_inputs(T=40, H=48, I=36, E=6, K=3, dtype=dtype, lora_rank=5, bias=True)
    for name in GRADIENTS:
        spoiled[name].fill_(math.nan)
    for save in expected:
        run(spoiled, torch.full((40, 48), math.nan, dtype=dtype), save=save)
        assert_same(run(inputs, grad_output, save=save), expected[save])


SCRIPT = """
import hashlib, torch, ktops
from ktops.testing.compare import random_grad_output, run
from ktops.testing.inputs import moe_inputs
from ktops.testing.isa import available_isas
for isa in available_isas():
    for dtype in (torch.float32, torch.bfloat16):
        for save in ("activations", "recompute"):
            sizes = {"T": 9, "H": 40, "I": 21, "E": 4, "K": 2}
            inputs = moe_inputs(**sizes, dtype=dtype, lora_rank=3, bias=True, invalid_ids=True)
            with ktops.use_isa(isa):
                results = run(inputs, random_grad_output(inputs), save=save)
            digest = hashlib.sha256()
            for value in results.values():
                digest.update(value.view(torch.uint8).numpy().tobytes())
            print(isa, dtype, save, digest.hexdigest())
"""


def test_results_do_not_depend_on_what_malloc_returns(tmp_path):
    """glibc fills fresh memory with the complement of MALLOC_PERTURB_: 0xfe is huge, 0x3f is about 0.7."""

    def report(fill: str) -> str:
        env = os.environ | {"MALLOC_PERTURB_": fill, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert report("1") == report("192")
