"""kt_kernel.sft by hand: architectures, device maps, wrapped models, and the autograd function."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_layer import ALPHA, RANK, adapters, assert_close, inputs, make, reference_gradients
from torch import nn

from ktops._warn import warn_once
from ktops.compat.lora import NAMES
from ktops.testing.budgets import gradient_budget

pytestmark = pytest.mark.usefixtures("single_thread", "installed")

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "num_experts_per_tok": 2, "pad_token_id": None,
}  # fmt: skip
MLA = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
DEEPSEEK = {
    **COMMON, "n_routed_experts": 8, "moe_intermediate_size": 24, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "head_dim": 16,
}  # fmt: skip
CONFIGS = {
    "DeepseekV2": {**DEEPSEEK, **MLA, "num_key_value_heads": 4},
    "DeepseekV3": {**DEEPSEEK, **MLA, "num_key_value_heads": 4},
    "Qwen2Moe": {
        **COMMON, "num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
    },
    "Qwen3Moe": {**COMMON, "num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8},
    "Glm4Moe": {**DEEPSEEK, "partial_rotary_factor": 0.5},
    "Mixtral": {**COMMON, "num_local_experts": 8},
}  # fmt: skip
"""Configurations of the models that the usage document names, and of one more that kt_kernel knows."""


def config_of(name: str):
    kind = getattr(transformers, f"{name}Config")
    return kind(**CONFIGS[name], architectures=[f"{name}ForCausalLM"])


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config_of(name)).bfloat16().eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_wrapped_models_compute_the_same(name):
    from kt_kernel.sft.arch import get_moe_arch_config, get_moe_module
    from kt_kernel.sft.layer import KTMoELayerWrapper
    from kt_kernel.sft.wrapper import wrap_moe_layers_with_kt_wrapper

    model = model_of(name)
    ids = torch.arange(24).view(2, 12)
    expected, names = model(ids).logits, list(model.state_dict())
    wrappers = wrap_moe_layers_with_kt_wrapper(model, SimpleNamespace(kt_backend="AMXBF16", kt_lora_rank=4))
    arch = get_moe_arch_config(model.config)
    blocks = [get_moe_module(layer, arch) for layer in model.model.layers]
    assert [block for block in blocks if block is not None] == wrappers == model._kt_wrappers
    assert all(isinstance(wrapper, KTMoELayerWrapper) for wrapper in wrappers) and wrappers
    assert [blocks.index(wrapper) for wrapper in wrappers] == [wrapper.layer_idx for wrapper in wrappers]
    assert (arch.expert_num, arch.num_experts_per_tok) == (8, 2)
    assert arch.intermediate_size == wrappers[0].experts.intermediate_size
    assert arch.has_shared_experts == any("shared" in key for key in names)
    assert list(model.state_dict()) == names
    actual = model(ids).logits
    assert (actual - expected).norm() < 0.02 * expected.norm()


def test_a_model_without_moe_layers_is_refused_and_unchanged():
    from kt_kernel.sft.arch import KTAMXModelNotSupportedError
    from kt_kernel.sft.wrapper import wrap_moe_layers_with_kt_wrapper

    config = transformers.LlamaConfig(**COMMON, architectures=["LlamaForCausalLM"])
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(KTAMXModelNotSupportedError, match=r"LlamaForCausalLM not supported .*DeepseekV2"):
        wrap_moe_layers_with_kt_wrapper(model, SimpleNamespace(kt_backend="AMXBF16"))
    model.config.architectures, model.config.num_experts = ["Qwen3MoeForCausalLM"], 8
    model.config.moe_intermediate_size = 24
    with pytest.raises(KTAMXModelNotSupportedError, match=r"must have Mixture-of-Experts layers"):
        wrap_moe_layers_with_kt_wrapper(model, SimpleNamespace(kt_backend="AMXBF16"))
    assert not hasattr(model, "_kt_wrappers")


def test_device_maps_have_the_experts_on_the_cpu():
    from kt_kernel.sft.wrapper import build_kt_device_map, build_kt_device_map_simplified

    config, plugin = config_of("Qwen3Moe"), SimpleNamespace(kt_num_gpu_experts=0)
    everything = ["model.embed_tokens", "model.norm", "lm_head", "model.layers.0", "model.layers.1"]
    simple = build_kt_device_map_simplified(config, plugin, "cuda:1")
    assert simple == {
        **dict.fromkeys(everything, "cuda:1"),
        "model.layers.0.mlp.experts": "cpu",
        "model.layers.1.mlp.experts": "cpu",
    }
    plugin.kt_num_gpu_experts = 3
    full = build_kt_device_map(config, plugin, "cuda:1")
    assert full == build_kt_device_map_simplified(config, plugin, "cuda:1")
    assert {name for name in full if name not in everything} == {
        f"model.layers.{layer}.mlp.experts.{expert}" for layer in range(2) for expert in range(8)
    }
    assert [full[f"model.layers.1.mlp.experts.{expert}"] for expert in (0, 2, 3, 7)] == [
        "cuda:1", "cuda:1", "cpu", "cpu",
    ]  # fmt: skip


def test_loading_stores_the_experts_in_the_backends_format(tmp_path):
    from kt_kernel.sft.arch import KTAMXConfigError
    from kt_kernel.sft.wrapper import load_kt_model

    model_of("Qwen3Moe").save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model_args = SimpleNamespace(model_name_or_path=str(tmp_path), kt_backend="AMXInt8")
    model = load_kt_model(config, model_args, SimpleNamespace(lora_rank=4, lora_alpha=8))
    experts = [wrapper.experts for wrapper in model._kt_wrappers]
    assert len(experts) == 2 and {each.down_proj.format for each in experts} == {"int8"}
    assert {wrapper.wrapper.lora_scaling for wrapper in model._kt_wrappers} == {2.0}
    with pytest.raises(KTAMXConfigError, match="give model_args, or kt_plugin and model_name_or_path"):
        load_kt_model(config)


def test_a_dense_model_in_memory_gets_the_backends_format_or_another_checkpoints_experts(tmp_path):
    from kt_kernel.sft.wrapper import wrap_moe_layers_with_kt_wrapper

    model, other = model_of("Qwen3Moe"), model_of("Qwen3Moe")
    for parameter in other.parameters():
        parameter.data.mul_(2)
    other.save_pretrained(tmp_path)
    plugin = {"kt_backend": "AMXInt4", "kt_weight_path": str(tmp_path)}
    first, _ = wrap_moe_layers_with_kt_wrapper(model, plugin)
    down = first.experts.down_proj
    assert down.format == "int4" and first.wrapper.down_proj is down
    wanted = other.model.layers[0].mlp.experts.down_proj
    assert (down.dequantize() - wanted).norm() < 0.2 * wanted.norm()


@pytest.mark.parametrize("parameters", [True, False])
def test_the_autograd_function_writes_the_wrappers_gradients(parameters):
    from kt_kernel.sft.autograd import KTMoEFunction

    wrapper = make("AMXBF16_SFT")
    given = adapters(wrapper)
    if parameters:
        given = {name: nn.Parameter(tensor) for name, tensor in given.items()}
    wrapper.init_lora_weights(*given.values())
    first, second = inputs(wrapper), inputs(wrapper, seed=1)
    outputs, leaves = [], []
    for hidden_states, ids, weights in (first, second):
        x, w = hidden_states[None].clone().requires_grad_(), weights.clone().requires_grad_()
        outputs.append(KTMoEFunction.apply(x, ids, w, wrapper, None, 64, 2, 0, True, True, None))
        leaves.append((x, w))
    grad_output = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    accumulated = dict.fromkeys(NAMES, 0)
    for output, (x, w), routed in zip(outputs, leaves, (first, second), strict=True):
        output.backward(grad_output)
        results = {name: getattr(wrapper, f"grad_{name}") for name in NAMES}
        results |= {"output": output.detach()[0], "grad_input": x.grad[0], "grad_weights": w.grad}
        expected = reference_gradients(wrapper, routed, given, grad_output[0])
        if parameters:
            accumulated = {name: accumulated[name] + expected[name] for name in NAMES}
            expected |= accumulated
        assert_close(results, expected, gradient_budget(torch.bfloat16))
    if parameters:
        assert all(given[name].grad is getattr(wrapper, f"grad_{name}") for name in NAMES)


def test_a_block_made_by_hand_trains_the_wrappers_parameters():
    from kt_kernel import KTMoEWrapper
    from kt_kernel.sft.arch import get_moe_arch_config
    from kt_kernel.sft.layer import KTMoELayerWrapper

    model = model_of("Qwen2Moe").train()
    block = model.model.layers[0].mlp
    gate, up = block.experts.gate_up_proj.detach().chunk(2, dim=1)
    backend = KTMoEWrapper(
        0, 8, 2, 32, 24, method="AMXBF16_SFT", mode="sft", lora_rank=RANK, lora_alpha=ALPHA
    )
    backend.load_weights_from_tensors(gate, up, block.experts.down_proj.detach())
    given = {name: nn.Parameter(tensor) for name, tensor in adapters(backend).items()}
    rows = torch.randn(1, 5, 32).bfloat16()
    before = block(rows)
    arguments = get_moe_arch_config(model.config), 32, 0
    with pytest.raises(TypeError, match=r"gate_lora_a must be an nn\.Parameter"):
        backend.init_lora_weights(*adapters(backend).values())
        KTMoELayerWrapper(block, backend, None, *arguments)
    backend.init_lora_weights(*given.values())
    wrapper = KTMoELayerWrapper(block, backend, None, *arguments)
    assert list(wrapper.lora_params) == list(NAMES) and wrapper.router is block.gate
    assert {id(p) for p in given.values()} <= {id(p) for p in wrapper.parameters()}
    output = wrapper(rows)
    assert not torch.equal(output, before)
    output.sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in given.values())
    wrapper.set_adapters(None)
    torch.testing.assert_close(wrapper(rows), before)
    with pytest.raises(NotImplementedError, match="full_weight_grad must be False"):
        KTMoELayerWrapper(block, backend, None, *arguments, full_weight_grad=True)
    with pytest.raises(
        ValueError, match=r"lora_params must have the names gate_lora_a, .*, got gate_lora_a$"
    ):
        wrapper.set_adapters({"gate_lora_a": given["gate_lora_a"]})


def test_adapters_of_the_usage_documents_wrappers_are_saved_and_loaded(tmp_path):
    from kt_kernel.sft import load_kt_moe_from_adapter, save_kt_moe_to_adapter

    from ktops import compat

    def wrapped():
        model = model_of("Qwen3Moe")
        compat.wrap_moe_layers_with_amx(model, SimpleNamespace(), SimpleNamespace(lora_rank=2, lora_alpha=4))
        return model

    model, other = wrapped(), wrapped()
    for parameter in compat.get_kt_lora_params(model):
        parameter.data.normal_()
    save_kt_moe_to_adapter(model, tmp_path)
    assert load_kt_moe_from_adapter(other, tmp_path) is None
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert not torch.equal(model(ids).logits, wrapped()(ids).logits)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device."""

    device = torch.device("cuda")


def test_moving_a_wrapped_model_leaves_the_experts_on_the_cpu():
    from ktops import compat

    model = model_of("Qwen3Moe")
    compat.wrap_moe_layers_with_amx(model, SimpleNamespace(), SimpleNamespace(lora_rank=2, lora_alpha=4))
    moved = []

    def move(tensor):
        moved.append(tensor)
        return tensor.detach().as_subclass(Elsewhere)

    for module in (model._kt_wrappers[0].experts, model._kt_wrappers[0].lora_params):
        module._apply(move)
    assert moved and all(tensor.numel() == 0 for tensor in moved)
    model.float()
    assert model._kt_wrappers[0].experts.down_proj.dtype == torch.float32


def test_names_of_the_extension_carry_threads():
    from kt_kernel import kt_kernel_ext

    pools = kt_kernel_ext.WorkerPoolConfig()
    pools.subpool_count, pools.subpool_numa_map, pools.subpool_thread_count = 2, [0, 1], [8, 8]
    assert kt_kernel_ext.CPUInfer(pools).num_threads == 16
    cpu_infer = kt_kernel_ext.CPUInfer(4)
    assert cpu_infer.num_threads == 4 and cpu_infer.sync() is None
    with pytest.raises(NotImplementedError, match=r"Use kt_kernel\.KTMoEWrapper"):
        cpu_infer.submit(object())
    with pytest.raises(AttributeError, match=r"does not serve kt_kernel_ext\.moe"):
        kt_kernel_ext.moe  # noqa: B018
    with pytest.raises(ValueError, match="must be positive, got 0"):
        kt_kernel_ext.CPUInfer(0)


def test_another_name_of_the_wrapper():
    from kt_kernel import AMXSFTMoEWrapper, KTMoEWrapper

    wrapper = AMXSFTMoEWrapper(0, 8, 2, 64, 32, 3, torch.get_num_threads(), 1, None, 512, lora_rank=4)
    same = KTMoEWrapper(0, 8, 2, 64, 32, num_gpu_experts=3, method="AMXBF16_SFT", mode="sft", lora_rank=4)
    assert type(wrapper) is type(same) and wrapper.num_gpu_experts == same.num_gpu_experts == 3
    assert wrapper.lora_scaling == same.lora_scaling == 8.0


def test_a_cpu_without_amx_is_named_once(monkeypatch):
    from kt_kernel.sft.wrapper import wrap_moe_layers_with_kt_wrapper

    import ktops

    warn_once.cache_clear()
    monkeypatch.setattr(ktops, "cpu_capability", lambda: "avx2")
    with pytest.warns(UserWarning, match=r"Intel AMX not supported on this CPU: .* avx2 kernels .*BIOS"):
        wrap_moe_layers_with_kt_wrapper(model_of("Mixtral"), SimpleNamespace(kt_backend="AMXBF16"))
