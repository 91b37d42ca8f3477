"""kt::moe_sft_fwd and kt::moe_sft_bwd: compares output and gradients with the float64 reference."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ktops
from ktops import reference
from ktops.ops.arguments import GRADIENTS
from ktops.testing.activations import ACTIVATION_CASES, SMOOTH, away_from_kinks
from ktops.testing.budgets import forward_budget, relative_error
from ktops.testing.compare import check_against_reference, one_thread, random_grad_output, run
from ktops.testing.inputs import ROUTINGS, moe_inputs, op_arguments, upcast
from ktops.testing.isa import available_isas
from ktops.testing.paths import use_path

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
SIZES = (1, 3, 8, 16, 17, 64)
ALL_GRADIENTS = (1 << len(GRADIENTS)) - 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_up_bias,down_bias", list(product([False, True], repeat=2)))
@pytest.mark.parametrize("lora_rank", [0, (3, 0), (0, 3), (3, 2)])
def test_subsets_of_lora_and_bias(isa, lora_rank, gate_up_bias, down_bias, dtype):
    inputs = moe_inputs(T=9, H=24, I=20, E=4, K=2, dtype=dtype, lora_rank=lora_rank, bias=True)
    if not gate_up_bias:
        del inputs["gate_up_bias"]
    if not down_bias:
        del inputs["down_bias"]
    check_against_reference(inputs)


MIXED = [
    *product(DTYPES[:3], repeat=3),
    *((torch.float16, lora, weights) for lora, weights in zip(DTYPES, DTYPES[2:] + DTYPES[:2], strict=True)),
    *((dtype, torch.float16, torch.float16) for dtype in DTYPES[:3]),
]
"""Dtypes of hidden states, of LoRA and biases, and of routing weights; not every combination with float16."""


@pytest.mark.parametrize("dtype,lora_dtype,weights_dtype", MIXED)
def test_mixed_dtypes(isa, dtype, lora_dtype, weights_dtype):
    check_against_reference(
        moe_inputs(
            T=9,
            H=24,
            I=20,
            E=4,
            K=2,
            dtype=dtype,
            lora_rank=4,
            bias=True,
            lora_dtype=lora_dtype,
            weights_dtype=weights_dtype,
        )
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATION_CASES, ids=str)
def test_activations(isa, activation, dtype):
    sizes = {"T": 17, "H": 24, "I": 20, "E": 4, "K": 2, "lora_rank": 4, "bias": True, "invalid_ids": True}
    inputs = away_from_kinks(moe_inputs(**sizes, dtype=dtype, gating=activation.gating)) | activation.options
    check_against_reference(inputs, save="recompute" if activation.gating == "interleaved" else "activations")


@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0])
@pytest.mark.parametrize("activation", ACTIVATION_CASES, ids=str)
def test_saturated_gates(isa, activation, scale):
    sizes = {"T": 17, "H": 24, "I": 20, "E": 4, "K": 2, "lora_rank": 4, "bias": True}
    inputs = moe_inputs(**sizes, scale=scale, gating=activation.gating) | activation.options
    check_against_reference(inputs)
    outputs = run(inputs, random_grad_output(inputs))
    assert all(value.isfinite().all() for value in outputs.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 33, 130])
def test_numbers_of_tokens(isa, num_tokens, dtype):
    check_against_reference(
        moe_inputs(T=num_tokens, H=40, I=24, E=5, K=3, dtype=dtype, lora_rank=4, bias=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_size", SIZES)
def test_odd_sizes(isa, hidden_size, dtype):
    for intermediate_size in SIZES:
        check_against_reference(
            moe_inputs(T=7, H=hidden_size, I=intermediate_size, E=3, K=2, dtype=dtype, lora_rank=2)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", SIZES)
def test_ranks(isa, rank, dtype):
    for ranks in ((rank, 5), (5, rank)):
        inputs = moe_inputs(T=9, H=17, I=33, E=3, K=2, dtype=dtype, lora_rank=ranks, lora_dtype=torch.float32)
        check_against_reference(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "num_tokens,hidden_size,intermediate_size",
    [(70, 264, 150), (150, 136, 200), (1050, 20, 17), (2, 2100, 24), (2, 24, 2100)],
)
def test_several_tiles(isa, num_tokens, hidden_size, intermediate_size, dtype):
    """There is more than one tile along each dimension, and the last is not full."""
    check_against_reference(
        moe_inputs(
            T=num_tokens,
            H=hidden_size,
            I=intermediate_size,
            E=2,
            K=1,
            dtype=dtype,
            lora_rank=(18, 35),
            routing="skewed",
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_size", [2016, 2047, 2048, 2049])
def test_longest_blocks_of_k(isa, hidden_size, dtype):
    """Panels of few columns hold up to 2048 steps of k at once; these rows fill their scratch."""
    with use_path("panels"):
        check_against_reference(moe_inputs(T=5, H=hidden_size, I=32, E=1, K=1, dtype=dtype, lora_rank=4))


@pytest.mark.parametrize("path,dtype", [("row_bands", torch.bfloat16), ("dots", torch.float32)])
@pytest.mark.parametrize("num_tokens", [5, 40, 300])
@pytest.mark.parametrize(
    "hidden_size,intermediate_size", [(64, 5), (64, 40), (96, 150), (150, 96), (2048, 20), (4096, 20)]
)
def test_rows_of_weights_as_they_lie(isa, hidden_size, intermediate_size, num_tokens, path, dtype):
    """Tiles along k are full; the last tile of rows is not, or there are too few rows for a tile."""
    with use_path(path):
        check_against_reference(
            moe_inputs(
                T=num_tokens,
                H=hidden_size,
                I=intermediate_size,
                E=2,
                K=1,
                dtype=dtype,
                lora_rank=2,
                bias=True,
            )
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [16, 70])
def test_wide_slabs(isa, num_tokens, dtype):
    """With enough experts for all threads, products that sum over a weight's rows read whole rows at once."""
    check_against_reference(moe_inputs(T=num_tokens, H=264, I=400, E=8, K=4, dtype=dtype, lora_rank=(18, 35)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_widest_slabs_of_rows_that_are_not_contiguous(isa, dtype):
    """Rows of the weight are copied for sums of columns; all rows read at once must fit."""
    inputs = moe_inputs(T=4, H=8, I=2064, E=4, K=4, dtype=dtype)
    for name in ("gate_up_proj", "down_proj"):
        inputs[name] = inputs[name].mT.contiguous().mT
    with one_thread():
        check_against_reference(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [1, 2, 5, 40])
def test_numbers_of_experts_and_slots(isa, num_experts, dtype):
    for top_k in sorted({1, 2, num_experts // 2, num_experts} - {0}):
        if top_k <= num_experts:
            check_against_reference(
                moe_inputs(T=5, H=16, I=8, E=num_experts, K=top_k, dtype=dtype, lora_rank=2)
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("invalid_ids", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(isa, routing, invalid_ids, ids_dtype, dtype):
    check_against_reference(
        moe_inputs(
            T=19,
            H=24,
            I=20,
            E=6,
            K=3,
            dtype=dtype,
            lora_rank=4,
            bias=True,
            routing=routing,
            invalid_ids=invalid_ids,
            ids_dtype=ids_dtype,
        )
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [5, 70])
@pytest.mark.parametrize("hidden_size,intermediate_size", [(0, 6), (8, 0), (0, 64), (64, 0)])
def test_empty_dimensions(isa, hidden_size, intermediate_size, num_tokens, dtype):
    """Without anything to sum, results are zeros or the bias, with few rows and with many."""
    inputs = {
        "hidden_states": torch.ones(num_tokens, hidden_size, dtype=dtype),
        "topk_ids": torch.zeros(num_tokens, 2, dtype=torch.int64),
        "topk_weights": torch.ones(num_tokens, 2, dtype=dtype),
        "gate_up_proj": torch.ones(3, 2 * intermediate_size, hidden_size, dtype=dtype),
        "down_proj": torch.ones(3, hidden_size, intermediate_size, dtype=dtype),
        "down_bias": torch.ones(3, hidden_size, dtype=dtype),
    }
    check_against_reference(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_valid_id_at_all(isa, dtype):
    inputs = moe_inputs(T=5, H=16, I=8, E=4, K=2, dtype=dtype, lora_rank=2, bias=True)
    inputs["topk_ids"].fill_(-1)
    for name, value in run(inputs, random_grad_output(inputs)).items():
        assert torch.equal(value, torch.zeros_like(value)), name


def test_experts_without_tokens_have_zero_gradients(isa):
    inputs = moe_inputs(
        T=9, H=16, I=8, E=6, K=2, dtype=torch.bfloat16, lora_rank=2, bias=True, routing="empty_experts"
    )
    results = run(inputs, random_grad_output(inputs))
    for name in GRADIENTS[2:]:
        assert torch.equal(results[name][::2], torch.zeros_like(results[name][::2])), name
        assert all(results[name][e].abs().max() > 0 for e in inputs["topk_ids"].unique()), name


def test_default_scalings_are_one(isa):
    inputs = moe_inputs(T=9, H=16, I=8, E=6, K=2, lora_rank=2)
    expected = ktops.moe_sft(**inputs | {"gate_up_scaling": 1.0, "down_scaling": 1.0})
    del inputs["gate_up_scaling"], inputs["down_scaling"]
    assert torch.equal(ktops.moe_sft(**inputs), expected)
    check_against_reference(inputs)


@pytest.mark.parametrize("scaling", [0.0, -2.0, 16.0])
def test_scalings(isa, scaling):
    inputs = moe_inputs(T=9, H=16, I=8, E=6, K=2, lora_rank=2)
    check_against_reference(inputs | {"gate_up_scaling": scaling, "down_scaling": scaling / 2})


@pytest.mark.parametrize("save", ["activations", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_gradient_alone_is_the_one_from_all(isa, dtype, save):
    inputs = moe_inputs(
        T=9, H=24, I=20, E=4, K=2, dtype=dtype, lora_rank=3, bias=True, lora_dtype=torch.float32
    )
    arguments = (*op_arguments(inputs), save)
    _, *saved, _, _, _ = torch.ops.kt.moe_sft_fwd(*arguments)

    def backward(grad_mask):
        return torch.ops.kt.moe_sft_bwd(random_grad_output(inputs), *arguments, *saved, grad_mask)

    everything = backward(ALL_GRADIENTS)
    assert all(gradient is not None for gradient in everything)
    assert backward(0) == (None,) * len(GRADIENTS)
    for bit, name in enumerate(GRADIENTS):
        alone = backward(1 << bit)
        assert torch.equal(alone[bit], everything[bit]), name
        assert [i for i, gradient in enumerate(alone) if gradient is not None] == [bit]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("save", ["activations", "recompute"])
def test_saved_tensors(isa, save, dtype):
    """They hold one row per position, routes sorted by expert and then by number, in hidden_states' dtype."""
    inputs = moe_inputs(T=9, H=24, I=20, E=4, K=2, dtype=dtype, lora_rank=(3, 5), bias=True, routing="skewed")
    output, gate_up, xa, ha, *host = torch.ops.kt.moe_sft_fwd(*op_arguments(inputs), save)
    assert output.shape == (9, 24) and host == [None] * 3
    assert gate_up.shape == ((18, 40) if save == "activations" else (0, 40))
    assert (xa.shape, ha.shape) == ((18, 3), (18, 5))
    assert {t.dtype for t in (output, gate_up, xa, ha)} == {dtype}
    assert all(t.is_contiguous() for t in (output, gate_up, xa, ha))
    exact = reference.moe_sft_fwd(op_arguments(upcast(inputs)), save)
    for actual, expected in zip((output, gate_up, xa, ha), exact, strict=True):
        assert relative_error(actual, expected) <= forward_budget(dtype)
    inputs = moe_inputs(T=9, H=24, I=20, E=4, K=2, dtype=dtype)
    _, _, xa, ha, *_ = torch.ops.kt.moe_sft_fwd(*op_arguments(inputs), save)
    assert (xa.shape, ha.shape) == ((18, 0), (18, 0))


@st.composite
def cases(draw):
    num_experts = draw(st.integers(1, 9))
    dtypes = st.sampled_from(DTYPES)
    ranks = st.integers(0, 20)
    activation = draw(st.sampled_from(SMOOTH))
    inputs = moe_inputs(
        T=draw(st.integers(0, 40)),
        H=draw(st.integers(1, 70)),
        I=draw(st.integers(1, 70)),
        E=num_experts,
        K=draw(st.integers(1, num_experts)),
        dtype=draw(dtypes),
        lora_rank=(draw(ranks), draw(ranks)),
        lora_dtype=draw(dtypes),
        weights_dtype=draw(dtypes),
        bias=draw(st.booleans()),
        ids_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        invalid_ids=draw(st.booleans()),
        routing=draw(st.sampled_from(ROUTINGS)),
        seed=draw(st.integers(0, 1 << 16)),
        gating=activation.gating,
    )
    return inputs | activation.options | {"reduce": draw(st.booleans())}


@pytest.mark.parametrize("isa", available_isas())
@settings(max_examples=60)
@given(inputs=cases(), recompute=st.booleans())
def test_any_case(isa, inputs, recompute):
    with ktops.use_isa(isa):
        save = "recompute" if recompute else "activations"
        check_against_reference(inputs, save=save)


@pytest.mark.parametrize("isa", available_isas())
@settings(max_examples=25)
@given(ids=st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-2, 5), min_size=12, max_size=12))
def test_any_id(isa, ids):
    inputs = moe_inputs(T=4, H=8, I=4, E=4, K=3, dtype=torch.bfloat16, lora_rank=2, bias=True)
    inputs["topk_ids"] = torch.tensor(ids).view(4, 3)
    with ktops.use_isa(isa):
        check_against_reference(inputs)


def test_a_non_finite_input_stays_in_its_row(isa):
    inputs = moe_inputs(T=9, H=24, I=20, E=4, K=2, dtype=torch.bfloat16, lora_rank=3, bias=True)
    expected = ktops.moe_sft(**inputs)
    inputs["hidden_states"][3] = math.nan
    output = ktops.moe_sft(**inputs)
    assert output[3].isnan().all()
    keep = torch.arange(9) != 3
    assert torch.equal(output[keep], expected[keep])


def test_weights_of_unused_experts_are_not_read_into_results(isa):
    inputs = moe_inputs(
        T=9, H=24, I=20, E=4, K=2, dtype=torch.bfloat16, lora_rank=3, bias=True, routing="empty_experts"
    )
    grad_output = random_grad_output(inputs)
    expected = run(inputs, grad_output)
    for name in GRADIENTS[2:]:
        inputs[name][::2] = math.nan
    for name, value in run(inputs, grad_output).items():
        assert torch.equal(value, expected[name]), name


def test_more_rows_than_are_kept_at_once(isa):
    """The rows of 9000 tokens are kept for a part of the experts at a time, those of 3000 all at once."""
    inputs = moe_inputs(T=9000, H=2048, I=32, E=3, K=2, dtype=torch.bfloat16, lora_rank=2, invalid_ids=True)
    grad_output = random_grad_output(inputs)
    names = ("hidden_states", "topk_ids", "topk_weights")
    parts = [inputs | {name: inputs[name][i : i + 3000] for name in names} for i in range(0, 9000, 3000)]
    grads = grad_output.split(3000)
    expected = [run(part, grad, ("hidden_states",)) for part, grad in zip(parts, grads, strict=True)]
    for name, value in run(inputs, grad_output, ("hidden_states",)).items():
        apart = torch.cat([part[name] for part in expected])
        assert relative_error(value, apart) < forward_budget(torch.bfloat16), name
