"""KTMoEWrapper: constructor, errors, masks, maps, and other behavior that needs no weights."""

import inspect
import math

import pytest
import torch
from tiny_layer import SIZES, TOKENS, adapters, assert_close, inputs, make, reference, weights

import ktops
from ktops._warn import warn_once
from ktops.compat import INFERENCE_METHODS, SFT_METHODS, KTMoEWrapper
from ktops.testing.budgets import forward_budget

pytestmark = pytest.mark.usefixtures("single_thread")

E, H, I = SIZES["num_experts"], SIZES["hidden_size"], SIZES["moe_intermediate_size"]  # noqa: E741


def assert_matches(wrapper, routed, expected=None):
    expected = reference(wrapper, *routed) if expected is None else expected
    assert_close({"output": wrapper.forward(*routed)}, {"output": expected}, forward_budget(torch.bfloat16))


def test_arguments_and_defaults():
    parameters = inspect.signature(KTMoEWrapper).parameters
    promised = {
        "cpu_save": False, "max_deferred_experts_per_token": None, "method": "AMXINT4", "numa_nodes": None,
        "mode": "inference", "num_gpu_experts": 0, "lora_rank": 16, "lora_alpha": 32.0, "max_cache_depth": 1,
        "group_size": 128, "zero_point": True,
    }  # fmt: skip
    first = [
        "layer_idx", "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size",
        "gpu_experts_mask", "cpuinfer_threads", "threadpool_count", "weight_path", "chunked_prefill_size",
    ]  # fmt: skip
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [*first, *promised]
    assert {name: parameters[name].default for name in promised} == promised
    assert [name for name, p in parameters.items() if p.default is p.empty] == first[:5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "train"}, r"mode must be one of inference, sft, got 'train'"),
        ({"method": "INT3"}, f"method must be one of {', '.join(INFERENCE_METHODS)} in .*, got 'INT3'"),
        ({"mode": "sft"}, f"method must be one of {', '.join(SFT_METHODS)} in mode 'sft'"),
        ({"num_experts": 0}, "num_experts must be positive, got 0"),
        ({"hidden_size": -1}, "hidden_size must be positive, got -1"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be at most num_experts=4, got 5"),
        ({"numa_nodes": [0, 1]}, r"numa_nodes must have threadpool_count=1 entries, got \[0, 1\]"),
        ({"gpu_experts_mask": torch.zeros(3)}, r"gpu_experts_mask must have shape \[4\], got \[3\]"),
        ({"max_deferred_experts_per_token": -1}, "max_deferred_experts_per_token must not be negative"),
        ({"swiglu_limit": -1.0}, "swiglu_limit must be finite and not negative, got -1.0"),
        ({"swiglu_alpha": math.inf}, "swiglu_alpha must be finite and not negative, got inf"),
        ({"num_gpu_experts": 5}, "num_gpu_experts must be from 0 to num_experts=4, got 5"),
        (
            {"num_gpu_experts": 1, "gpu_experts_mask": torch.ones(4)},
            "num_gpu_experts must be 0 or the number of experts in gpu_experts_mask, 4, got 1",
        ),
        ({"lora_dropout": 0.1}, "lora_dropout must be 0.0, got 0.1"),
        ({"full_weight_grad": True}, "full_weight_grad must be False, got True: ktops.nn.KTExperts"),
    ],
)
def test_constructor_errors(options, message):
    with pytest.raises(ValueError, match=f"^KTMoEWrapper: {message}"):
        make("BF16", load=False, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, "lora_rank must be positive, got 0"),
        ({"lora_alpha": 0.0}, "lora_alpha must be positive and finite, got 0.0"),
        ({"max_cache_depth": 0}, "max_cache_depth must be positive, got 0"),
        ({"num_gpu_experts": 5}, "num_gpu_experts must be from 0 to num_experts=4, got 5"),
    ],
)
def test_constructor_errors_of_sft(options, message):
    with pytest.raises(ValueError, match=f"^KTMoEWrapper: {message}"):
        make("AMXBF16_SFT", load=False, **options)


def test_other_threads_are_warned_of():
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="not with cpuinfer_threads=77: call torch.set_num_threads"):
        make("BF16", load=False, cpuinfer_threads=77)


def test_saving_is_warned_of():
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="cpu_save=True stores nothing: use `ktops convert`"):
        make("BF16", load=False, cpu_save=True)


@pytest.mark.parametrize("method", ["BF16", "AMXBF16_SFT"])
def test_forward_before_loading(method):
    wrapper = make(method, load=False)
    with pytest.raises(RuntimeError, match="weights not loaded: call load_weights"):
        wrapper.forward(*inputs(wrapper))
    with pytest.raises(RuntimeError, match=r"no pending forward: call submit_forward\(\) first"):
        wrapper.sync_forward(*([inputs(wrapper)[0]] if method == "BF16" else []))


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (TOKENS, H + 1), r"hidden_states must have shape \[num_tokens, 64\], got \[7, 65\]"),
        (0, (H,), r"hidden_states must have shape \[num_tokens, 64\], got \[64\]"),
        (1, (TOKENS, 3), r"topk_ids must have shape \[7, 2\], got \[7, 3\]"),
        (2, (TOKENS - 1, 2), r"topk_weights must have shape \[7, 2\], got \[6, 2\]"),
    ],
)
@pytest.mark.parametrize("method", ["BF16", "AMXBF16_SFT"])
def test_wrong_inputs(method, index, shape, message):
    wrapper = make(method)
    if method == "AMXBF16_SFT":
        wrapper.init_lora_weights(**adapters(wrapper))
    routed = list(inputs(wrapper))
    routed[index] = routed[index].new_zeros(shape)
    for start in (wrapper.forward, wrapper.submit_forward):
        with pytest.raises(ValueError, match=f"KTMoEWrapper: {message}"):
            start(*routed)


@pytest.mark.parametrize("method", ["BF16", "AMXBF16_SFT"])
def test_ids_and_weights_in_the_wrong_order(method):
    wrapper = make(method)
    if method == "AMXBF16_SFT":
        wrapper.init_lora_weights(**adapters(wrapper))
    hidden_states, ids, weights = inputs(wrapper)
    with pytest.raises(TypeError, match=r"KTMoEWrapper: topk_ids must be integers, got torch\.float32"):
        wrapper.forward(hidden_states, weights, ids)


@pytest.mark.parametrize(
    ("index", "change", "error", "message"),
    [
        (0, lambda t: t[:, 1:], ValueError, r"gate_proj must have shape \[4, 96, 64\], got \[4, 95, 64\]"),
        (1, lambda t: t[1:], ValueError, r"up_proj must have shape \[4, 96, 64\], got \[3, 96, 64\]"),
        (2, lambda t: t.mT, ValueError, r"down_proj must have shape \[4, 64, 96\], got \[4, 96, 64\]"),
        (2, lambda t: t.int(), TypeError, "down_proj must be bfloat16, float16 or float32, got torch.int32"),
        (1, lambda t: t.float(), TypeError, "up_proj must have the dtype of gate_proj=torch.bfloat16"),
    ],
)
def test_wrong_tensors_leave_the_old_ones(index, change, error, message):
    wrapper = make("AMXINT8")
    before = wrapper.gate_up_proj
    given = list(weights(wrapper))
    given[index] = change(given[index])
    with pytest.raises(error, match=f"KTMoEWrapper: {message}"):
        wrapper.load_weights_from_tensors(*given)
    assert wrapper.gate_up_proj is before


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([0, 1, 2], ValueError, r"must have shape \[4\], got \[3\]"),
        ([0, 1, 2, 4], ValueError, "must hold experts 0 to 3, got 4 at 3"),
        ([0, -1, 2, 3], ValueError, "must hold experts 0 to 3, got -1 at 1"),
        ([0.0, 1.0, 2.0, 3.0], TypeError, "must hold integers, got torch.float32"),
    ],
)
def test_wrong_maps(given, error, message):
    wrapper = make("BF16", load=False)
    with pytest.raises(error, match=f"physical_to_logical_map {message}"):
        wrapper.load_weights_from_tensors(*weights(wrapper), torch.tensor(given))
    assert wrapper.gate_up_proj is None


@pytest.mark.parametrize("method", ["BF16", "AMXINT4"])
def test_physical_to_logical_map(method):
    """Physical expert p is logical expert map[p]; a logical expert may occur twice."""
    given, plain = [2, 0, 3, 0], make(method)
    wrapper = make(method, load=False)
    wrapper.compute = plain.compute = "bf16"
    wrapper.load_weights_from_tensors(*weights(wrapper), torch.tensor(given, dtype=torch.int32))
    hidden_states, physical, topk_weights = inputs(wrapper)
    logical = torch.tensor(given)[physical]
    assert_matches(
        wrapper,
        (hidden_states, physical, topk_weights),
        reference(plain, hidden_states, logical, topk_weights),
    )


def test_masked_experts_are_skipped():
    mask = torch.tensor([True, False, True, False])
    wrapper = make("BF16", gpu_experts_mask=mask)
    assert wrapper.num_gpu_experts == 2
    hidden_states, ids, topk_weights = inputs(wrapper)
    ids = torch.where(torch.arange(TOKENS)[:, None] == 1, torch.tensor([9, -3]), ids)
    kept = topk_weights.masked_fill(torch.isin(ids, torch.tensor([0, 2])), 0)
    assert 0 < kept.count_nonzero() < kept.numel()
    expected = reference(wrapper, hidden_states, ids, kept)
    assert_matches(wrapper, (hidden_states, ids.int(), topk_weights), expected)
    elsewhere = make("BF16", gpu_experts_mask=~mask)
    both = wrapper.forward(hidden_states, ids, topk_weights).double()
    both += elsewhere.forward(hidden_states, ids, topk_weights)
    complete = reference(wrapper, hidden_states, ids, topk_weights)
    assert_close({"sum": both}, {"sum": complete}, forward_budget(torch.bfloat16))


def test_the_mask_may_change_later():
    wrapper = make("BF16")
    routed = inputs(wrapper)
    assert_matches(wrapper, routed)
    wrapper.gpu_experts_mask.fill_(True)
    assert not wrapper.forward(*routed).any()
    wrapper.gpu_experts_mask = torch.zeros(E)
    assert_matches(wrapper, routed)
    with pytest.raises(ValueError, match=r"gpu_experts_mask must have shape \[4\], got \[3\]"):
        wrapper.gpu_experts_mask = torch.zeros(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_has_the_dtype_of_the_input(dtype):
    wrapper = make("BF16")
    hidden_states, ids, topk_weights = inputs(wrapper)
    output = wrapper.forward(hidden_states.to(dtype).view(1, TOKENS, H), ids, topk_weights.bfloat16())
    assert output.dtype == dtype and output.shape == (TOKENS, H)
    expected = reference(wrapper, hidden_states, ids, topk_weights.bfloat16())
    assert_close({"output": output}, {"output": expected}, forward_budget(torch.bfloat16))


def test_no_tokens():
    wrapper = make("BF16", max_deferred_experts_per_token=1)
    routed = inputs(wrapper, 0)
    assert wrapper.forward(*routed).shape == (0, H)


def test_capture_batch_sizes():
    before = KTMoEWrapper.get_capture_batch_sizes()
    KTMoEWrapper.set_capture_batch_sizes([1, 2, 4])
    assert KTMoEWrapper.get_capture_batch_sizes() == [1, 2, 4]
    with pytest.raises(ValueError, match=r"capture_bs must be positive, got \[0\]"):
        KTMoEWrapper.set_capture_batch_sizes([0])
    KTMoEWrapper.set_capture_batch_sizes(before)


@pytest.mark.parametrize("clear", [KTMoEWrapper.clear_buffer_cache, KTMoEWrapper.clear_sft_buffer_cache])
def test_clearing_gives_memory_back(clear):
    wrapper = make("BF16")
    wrapper.forward(*inputs(wrapper))
    assert ktops.memory_stats()["bytes_idle"] > 0
    clear()
    assert ktops.memory_stats()["bytes_idle"] == 0
