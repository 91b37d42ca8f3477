"""Tiny random Mixture-of-Experts language models, one per architecture.

The routers' logits are spread out, so that rounding does not move a token to another expert. The experts'
weights are as large as their fan-in allows, so that their share of output and gradients is far above
rounding.
"""

import inspect
import math
from importlib.util import find_spec

import torch
import transformers

VOCAB_SIZE = 97
NUM_EXPERTS = 8
TOP_K = 3

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "head_dim": 8,
}
"""Of models whose intermediate_size is that of their experts."""

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN = {"num_experts": NUM_EXPERTS, "norm_topk_prob": True}
_SHARED = {"shared_expert_intermediate_size": 24}
_LINEAR_ATTENTION = {
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_GROUPED_ROUTER = {
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}

ARCHITECTURES = {
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_QWEN, **_SHARED, "norm_topk_prob": False}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_QWEN, "head_dim": 8}),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        {"num_experts": NUM_EXPERTS, **_SHARED, **_LINEAR_ATTENTION},
    ),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", {**_QWEN, **_SHARED, **_LINEAR_ATTENTION}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": NUM_EXPERTS}),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {**_LATENT_ATTENTION, **_GROUPED_ROUTER, "topk_method": "greedy"},
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**_LATENT_ATTENTION, **_GROUPED_ROUTER}),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", {**_GROUPED_ROUTER, "head_dim": 8}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {"num_experts": NUM_EXPERTS}),
}
"""Maps folders of transformers to (model class, config class, config keys)."""

ARCHITECTURES = {
    folder: row for folder, row in ARCHITECTURES.items() if find_spec(f"transformers.models.{folder}")
}


def tiny_config(architecture: str, **overrides) -> transformers.PreTrainedConfig:
    """Returns the configuration of a tiny model; experts are eager without ``experts_implementation``."""
    _, config_class, keys = ARCHITECTURES[architecture]
    known = inspect.signature(getattr(transformers, config_class)).parameters
    common = {name: value for name, value in _COMMON.items() if name in known}
    keys = {**common, "experts_implementation": "eager", **keys, **overrides}
    return getattr(transformers, config_class)(**keys)


def tiny_model(
    architecture: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides
) -> transformers.PreTrainedModel:
    """Returns a tiny random causal language model in training mode.

    Args:
        architecture: a key of ``ARCHITECTURES``.
        dtype: the dtype of the parameters; models that differ only in dtype have the same weights, rounded.
        seed: two models with the same seed have the same weights.
        overrides: configuration keys: ``output_router_logits=True``, ``experts_implementation="ktops"``, ...
    """
    model_class = getattr(transformers, ARCHITECTURES[architecture][0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(tiny_config(architecture, **overrides))
        _spread(model)
    return model.to(dtype).train()


def tiny_batch(seed: int = 0, batch: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Returns ``input_ids`` and ``labels`` for any tiny model."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


@torch.no_grad()
def _spread(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
        elif name.endswith((".gate.weight", ".router.weight")):
            parameter.normal_(std=2 / math.sqrt(parameter.shape[-1]))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.05)
