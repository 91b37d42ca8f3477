"""Experts that the op does not support give one warning that names them, and the result of transformers."""

import math
import subprocess
import sys
import warnings

import every_model
import pytest
import torch
import transformers
from model_runs import MODEL_BUDGET, CountOps
from tiny_models import tiny_batch, tiny_config
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.models.beam.modeling_beam import BeamExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import ktops
from ktops._warn import warn_once
from ktops.checkpoints.activations import BY_HIDDEN_ACT
from ktops.integrations.transformers import activation_name
from ktops.integrations.transformers.architectures import Unsupported, describe
from ktops.ops.activation import ACTIVATIONS, ExpertFunction
from ktops.testing.budgets import forward_budget, relative_error

pytestmark = pytest.mark.usefixtures("enabled")


class OwnGate(GptOssExperts):
    """Has a gate that ktops does not know."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return super()._apply_gate(gate_up).tanh()


def with_own_gate(**keys) -> transformers.PreTrainedModel:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **heads, **experts, **keys))
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = OwnGate
    return model


def loss(model) -> torch.Tensor:
    return model(**tiny_batch()).loss.detach()


def test_unsupported_model_warns_once_and_gives_its_own_result():
    model = with_own_gate(experts_implementation="ktops")
    with pytest.warns(UserWarning) as caught, CountOps() as ops:
        first = loss(model)
        second = loss(model)
    messages = [str(w.message) for w in caught if "ktops" in str(w.message)]
    assert len(messages) == 1
    assert "test_transformers_fallback.OwnGate: ktops does not know its _apply_gate" in messages[0]
    assert not ops.counts
    expected = loss(with_own_gate(experts_implementation="grouped_mm"))
    assert torch.equal(first, expected) and torch.equal(second, expected)


def test_unsupported_model_warns_while_compiling():
    model = with_own_gate(experts_implementation="ktops").model.layers[0].mlp
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 32)
    with torch.no_grad(), pytest.warns(UserWarning, match="OwnGate"):
        actual = compiled(x)[0]
    torch._dynamo.reset()
    assert relative_error(actual, model(x)[0]) < MODEL_BUDGET


def test_lora_factors_for_unsupported_experts_are_not_ignored():
    experts = with_own_gate(experts_implementation="ktops").model.layers[0].mlp.experts
    lora = {"down_lora_A": torch.zeros(4, 1, 24), "down_lora_B": torch.zeros(4, 32, 1)}
    with pytest.raises(NotImplementedError, match=r"LoRA on .*OwnGate"):
        ALL_EXPERTS_FUNCTIONS["ktops"](experts, None, None, None, **lora)


def routes(num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = torch.randn(7, num_experts).softmax(-1).topk(2)
    return ids, weights


def make(experts_class, config, **attributes):
    experts = experts_class(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    for name, value in attributes.items():
        experts._modules.pop(name, None)
        setattr(experts, name, value)
    return experts


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"act_fn": ACT2FN["leaky_relu"]}, "no activation LeakyReLU"),
        ({"act_fn": ACT2FN["quick_gelu"]}, "no activation QuickGELU"),
        ({"act_fn": torch.tanh}, "no activation tanh"),
        ({"_apply_gate": torch.relu}, "its _apply_gate was replaced"),
    ],
)
def test_every_unsupported_layout_has_its_reason(attributes, reason):
    experts = make(Qwen3MoeExperts, tiny_config("qwen3_moe"))
    assert describe(experts).function == ExpertFunction("silu")
    experts = make(Qwen3MoeExperts, tiny_config("qwen3_moe"), **attributes)
    with pytest.raises(Unsupported, match=reason):
        describe(experts)


@pytest.mark.parametrize("name", [name for name in ACT2CLS if name != "xielu"])
def test_activations_are_mapped_only_where_equal(name):
    """An activation is mapped to one of the op's if and only if it is the same function."""
    x = torch.linspace(-15, 15, 1001, dtype=torch.float64)
    act_fn = ACT2FN[name].double()
    equal = {
        name
        for name, known in ACTIVATIONS.items()
        if known.of_gate and torch.allclose(known.function(x)[0], act_fn(x), rtol=0, atol=1e-9)
    }
    mapped = activation_name(act_fn)
    assert equal == ({mapped} if mapped else set())
    assert BY_HIDDEN_ACT.get(name, mapped) == mapped


def test_functions_and_torch_modules_as_activation():
    functional = nn.functional
    known = [(functional.silu, "silu"), (functional.gelu, "gelu"), (nn.GELU("tanh"), "gelu_tanh")]
    for act_fn, name in known:
        x = torch.randn(50, dtype=torch.float64)
        assert activation_name(act_fn) == name
        assert torch.allclose(act_fn(x), ACTIVATIONS[name].function(x)[0])
    assert activation_name(None) is None
    assert activation_name(nn.GELU()) == "gelu"


def test_own_gate_that_is_the_same_function_runs_in_the_op():
    """Beam's _apply_gate is act_fn(gate) * up in float32."""
    config = tiny_config("mixtral")
    config.num_experts, config.moe_intermediate_size = config.num_local_experts, config.intermediate_size
    experts = make(BeamExperts, config).double()
    x = torch.randn(7, 32, dtype=torch.float64)
    config._experts_implementation = "eager"
    expected = experts(x, *(route := routes(8)))
    config._experts_implementation = "ktops"
    with CountOps() as ops:
        actual = experts(x, *route)
    assert ops.counts["moe_sft_fwd"] == 1
    assert relative_error(actual, expected) < forward_budget(torch.float32)  # its gate runs in float32


def test_limits():
    """A limit of None or infinity is none at all; one of another activation than silu is not known."""
    config = tiny_config("mixtral", swiglu_limit=0.5)
    config.moe_intermediate_size = config.intermediate_size
    experts = make(DeepseekV4Experts, config)
    assert describe(experts).function == ExpertFunction("swiglu_clamped", (0.5, 1.0, 0.0))
    for limit in (None, math.inf):
        experts.limit = limit
        assert describe(experts).function == ExpertFunction("silu")
    experts.act_fn = ACT2FN["gelu"]
    with pytest.raises(Unsupported, match=r"^it limits an activation other than silu, GELUActivation$"):
        describe(experts)


def test_quantized_experts_run_eagerly():
    """Each quantized layer decorates the class once more; the eager forward is underneath all of them."""

    class Quantized(nn.Module):
        def __init__(self, config):
            super().__init__()
            weight = torch.zeros(2, 4, 4, dtype=torch.float8_e4m3fn)
            self.down_proj = nn.Parameter(weight, requires_grad=False)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states + 1

    for _ in range(3):
        Quantized = use_experts_implementation(Quantized)
    experts = Quantized(tiny_config("qwen3_moe", experts_implementation="ktops"))
    with pytest.warns(UserWarning, match="its weights are quantized"):
        assert experts(torch.zeros(3, 4), None, None).eq(1).all()
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    assert "ktops" in ALL_FP8_EXPERTS_FUNCTIONS


def test_expert_parallel_ids_are_skipped():
    """Experts in another process have ids of num_experts and above."""
    experts = make(Qwen3MoeExperts, tiny_config("qwen3_moe"))
    x, (ids, weights) = torch.randn(7, 32), routes(8)
    ids[::2, 0] = 8
    expected = experts(x, ids % 8, weights * (ids < 8))
    experts.config._experts_implementation = "ktops"
    assert relative_error(experts(x, ids, weights), expected) < MODEL_BUDGET


WITHOUT_TRANSFORMERS = """
import sys
import torch, ktops, ktops.nn
print([name for name in ("transformers", "peft") if name in sys.modules])
sys.modules["transformers"] = None

class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        like = ktops.nn.KTExperts(3, 8, 4)
        self.gate_up_proj, self.down_proj = like.gate_up_proj, like.down_proj
        self.act_fn = torch.nn.SiLU()
    def forward(self, x, ids, weights):
        gate, up = (self.gate_up_proj[ids] @ x[:, None, :, None])[..., 0].chunk(2, -1)
        down = (self.down_proj[ids] @ (self.act_fn(gate) * up)[..., None])[..., 0]
        return (weights[..., None] * down).sum(1)

print(ktops.swap_experts(torch.nn.Sequential(Experts())))
try:
    ktops.enable()
except ImportError as error:
    print(error)
"""


def test_without_transformers():
    """Importing ktops imports only torch; swap_experts works, and enable names what to install."""
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRANSFORMERS], check=True, capture_output=True, text=True
    )
    imported, swapped, error = run.stdout.splitlines()
    assert imported == "[]"
    assert swapped == "['0']"
    assert "pip install 'ktops[transformers]'" in error


def test_supported_models_do_not_warn():
    experts = make(Qwen3MoeExperts, tiny_config("qwen3_moe", experts_implementation="ktops"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experts(torch.randn(7, 32), *routes(8))


def llama4(**keys) -> transformers.PreTrainedModel:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    config = transformers.Llama4TextConfig(num_hidden_layers=2, **sizes, **heads, **experts, **keys)
    return transformers.Llama4ForCausalLM(config)


def test_experts_outside_of_the_interface_warn_once(tmp_path):
    """These experts never look up an implementation."""
    ways = (
        lambda: llama4(experts_implementation="ktops"),
        lambda: llama4().set_experts_implementation("ktops"),
        lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="ktops"),
    )
    llama4().save_pretrained(tmp_path)
    for way in ways:
        warn_once.cache_clear()
        with pytest.warns(UserWarning, match="ktops does not run") as caught:
            way()
        assert [str(w.message).count("llama4.Llama4TextExperts: it is not in") for w in caught] == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llama4().set_experts_implementation("eager")


def test_experts_that_take_other_arguments_are_refused():
    with pytest.raises(Unsupported, match=r"^its forward does not take \(hidden_states, top_k_index, top_k"):
        describe(nn.Linear(3, 3))


def test_experts_without_stacked_weights_are_not_loaded(tmp_path):
    model = every_model.tiny_model("jetmoe")
    model.save_pretrained(tmp_path)
    message = r"JetMoeMoE: its weights are not stacked, so only ktops\.swap_experts replaces it"
    with pytest.raises(ValueError, match=message):
        ktops.load_experts(model, tmp_path, show_progress=False)
    with pytest.raises(ValueError, match=message):
        kt = ktops.KTConfig("int8")
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=kt)
