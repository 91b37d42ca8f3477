"""Builds a tiny random model of every folder of the installed transformers that contains experts."""

import inspect
import re
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

VOCAB_SIZE = 97
FIRST_SPECIAL_TOKEN = 64
"""Tokens from here to the end of the vocabulary stand for images and the like."""

NUM_EXPERTS = 6
TOP_K = 2

LIMIT = 1.0
"""Where experts clamp or cap their gate and up projections, about one of their standard deviations."""

EXPERTS = re.compile(
    r"@use_experts_implementation"
    r"|^class \w*(Experts?|Moe|MoE|SparseMLP)\(nn\.\w+\)"
    r"|\b(num_local_experts|num_experts|n_routed_experts|moe_num_experts)\b",
    re.MULTILINE,
)
"""What the modeling file of a model with experts contains."""

MAPPINGS = (
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MULTIMODAL_LM",
    "TOKEN_CLASSIFICATION",
)
"""Auto classes that compute a loss, the preferred first."""

SIZES = {
    **dict.fromkeys((
        "hidden_size", "d_model", "n_embd", "out_hidden_size", "projection_hidden_size",
        "decoder_ffn_dim", "moe_hidden_size", "shared_intermediate_size", "text_hidden_size",
        "vision_hidden_size", "projector_hidden_size", "projection_intermediate_size",
        "projection_hidden_dim", "projector_input_dim", "projector_output_dim", "vision_output_dim",
        "adapter_in_dim", "adapter_input_size", "adapter_out_dim",
    ), 32),
    **dict.fromkeys((
        "intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "d_ff",
        "dense_intermediate_size", "prefix_dense_intermediate_size", "encoder_ffn_dim",
    ), 40),
    **dict.fromkeys((
        "moe_intermediate_size", "shared_expert_intermediate_size", "share_expert_dim",
        "shared_experts_intermediate_size", "expert_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
    ), 24),
    **dict.fromkeys((
        "num_hidden_layers", "num_layers", "n_layers", "encoder_layers", "decoder_layers",
        "num_decoder_layers", "num_key_value_heads", "kv_n_heads", "swa_num_key_value_heads",
        "linear_num_key_heads", "n_group", "n_groups", "zero_expert_num", "depth",
    ), 2),
    **dict.fromkeys((
        "num_attention_heads", "n_heads", "num_heads", "encoder_attention_heads",
        "decoder_attention_heads", "swa_num_attention_heads", "linear_num_value_heads",
        "linear_num_heads", "num_sliding_attention_heads",
    ), 4),
    **dict.fromkeys((
        "head_dim", "swa_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "d_kv", "kv_channels",
        "index_head_dim", "rotary_dim", "mamba_num_heads", "mamba_n_heads", "mamba_head_dim",
        "mamba_d_state", "ssm_state_size", "sliding_window",
    ), 8),
    **dict.fromkeys((
        "kv_lora_rank", "q_lora_rank", "o_lora_rank", "position_embedding_size",
    ), 16),
    **dict.fromkeys((
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    ), NUM_EXPERTS),
    **dict.fromkeys((
        "num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
    ), TOP_K),
    **dict.fromkeys((
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "topk_group",
        "expert_layer_period",
    ), 1),
    **dict.fromkeys((
        "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_mtp_layers",
        "num_nextn_predict_layers", "expert_layer_offset",
    ), 0),
    **dict.fromkeys((
        "swiglu_limit", "mlp_gate_softcap", "mlp_up_softcap",
    ), LIMIT),
    **dict.fromkeys((
        "router_jitter_noise", "input_jitter_noise", "mtp_loss_scaling_factor",
    ), 0.0),
    **dict.fromkeys((
        "vocab_size_per_layer_input", "unpadded_vocab_size", "vocab_size", "ngram_vocab_size_base",
    ), VOCAB_SIZE),
    **dict.fromkeys((
        "downsample_hidden_size", "hidden_size_per_layer_input", "pos_emb_height", "pos_emb_width",
    ), 8),
    **dict.fromkeys((
        "image_size", "global_head_dim", "num_position_embeddings", "max_image_size", "max_img_size",
    ), 16),
    "patch_size": 4,
    "mlp_layer_types": ["sparse", "sparse"],
    "mlp_only_layers": [],
    "max_position_embeddings": 128,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
    "initializer_range": 0.2,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
"""Values of configuration keys, where a model has them."""

MROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [1, 1, 2],
    "partial_rotary_factor": 1.0,
}

SAM = {
    "image_size": 32,
    "output_channels": 8,
    "downsample_channels": [8, 32],
    "window_size": 4,
    "mlp_dim": 40,
}

MORE: dict[str, dict] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bamba": {"mamba_d_head": 8},
    "deepseek_ocr2_sam_vision_model": SAM,
    "deepseek_v4": {"mlp_layer_types": ["moe", "moe"]},
    "granitemoehybrid": {"mamba_d_head": 8},
    "step3p5": {"swiglu_limits": [LIMIT, None]},
    "nemotron_h_omni": {"image_token_id": FIRST_SPECIAL_TOKEN},
    "nemotron_h": {"layers_block_type": ["moe", "attention"]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "doge": {"is_moe": True, "num_experts": 16},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [24, 24], "rope_parameters": MROPE},
    "gemma4_text": {"enable_moe_block": True},
    "gemma4_vision": {"pooling_kernel_size": 2},
    "glm4v_moe_text": {"rope_parameters": MROPE},
    "glm5_next_text": {"qk_rope_head_dim": 0},

    "hy_v4_vl_text": {"rope_parameters": MROPE},
    "inkling_vision": {"num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_vision_model": {"intermediate_size": 128},
    "muse_spark": {"out_hidden_size": 128},
    "muse_spark_audio": {"hidden_sizes": [8, 8], "depths": [1, 1], "patch_sizes": [4, 4]},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "moe_token_dropout": 0.0,
        "dropout": 0.0, "attention_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
    "openai_privacy_filter": {"num_labels": VOCAB_SIZE},
    "radio": {"video_temporal_patch_size": 2},
    "step3p5_vision": {"image_size": 32},
    "switch_transformers": {"dropout_rate": 0.0, "decoder_start_token_id": 0,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "unlimited_ocr_sam_vision_model": SAM,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Maps each model type to what its configuration needs in addition to SIZES, or instead."""


def folders() -> list[str]:
    """Returns the names of the model folders of transformers that contain experts."""
    root = Path(transformers.__file__).parent / "models"
    files = sorted(root.glob("*/modeling_*.py"))
    return [file.parent.name for file in files if EXPERTS.search(file.read_text())]


def model_classes(folder: str) -> list[tuple[str, type[transformers.PreTrainedModel]]]:
    """Returns model type and class of the models in a folder that compute a loss, the smallest first."""
    found = []
    for mapping in MAPPINGS:
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
        for model_type in configuration_auto.CONFIG_MAPPING_NAMES:
            if configuration_auto.model_type_to_module_name(model_type) == folder and model_type in names:
                name = names[model_type]
                model_class = getattr(transformers, name if isinstance(name, str) else name[0])
                config_class = configuration_auto.CONFIG_MAPPING[model_type]
                if model_class.config_class in (config_class, None):
                    found.append((model_type, model_class))
    return sorted(found, key=lambda item: len(item[1].config_class.sub_configs))


def tiny_keys(config_class: type[PreTrainedConfig], **overrides) -> dict:
    """Returns arguments that make a configuration tiny, sub-configurations included."""
    fields = set(inspect.signature(config_class).parameters)
    keys = {key: value for key, value in SIZES.items() if key in fields}
    if "kv_lora_rank" in fields:
        keys["num_key_value_heads"] = keys["num_attention_heads"]
    default = config_class()
    special = FIRST_SPECIAL_TOKEN
    for name in sorted(fields - keys.keys()):
        if re.search(r"_token_(id|index)$", name) and isinstance(getattr(default, name, None), int):
            keys[name] = special
            special += 1
    for name, part_class in config_class.sub_configs.items():
        part = getattr(default, name, None)
        if part_class is AutoConfig:
            part_class = type(part)
        if part is not None or name == "vision_config":
            keys[name] = tiny_keys(part_class)
            keys[name]["model_type"] = part_class.model_type
    return {**keys, **MORE.get(config_class.model_type, {}), **overrides}


def tiny_config(model_type: str, **overrides) -> PreTrainedConfig:
    config_class = configuration_auto.CONFIG_MAPPING[model_type]
    return config_class(**tiny_keys(config_class, **overrides))


def tiny_model(
    folder: str,
    dtype: torch.dtype = torch.float32,
    rounded_to: torch.dtype | None = None,
    **overrides,
) -> transformers.PreTrainedModel:
    """Returns a tiny random model in training mode, with eager experts.

    It has the same values in any dtype, rounded; with ``rounded_to``, those of that dtype. Parameters that
    the model keeps in float32 stay in float32.

    The routers' logits are spread out, so that rounding does not move a token to another expert. The
    projections of the experts are large enough for their clamps to act.

    Raises:
        ValueError: no class of the folder computes a loss.
    """
    classes = model_classes(folder)
    if not classes:
        raise ValueError(f"no tiny configuration is known for the models in {folder}")
    return random_model(*classes[0], dtype, rounded_to, **overrides)


def weighs_router_loss(folder: str) -> bool:
    """Returns whether the configuration of the folder's model weighs an auxiliary loss of the routers."""
    return hasattr(tiny_config(model_classes(folder)[0][0]).get_text_config(), "router_aux_loss_coef")


def random_model(
    model_type: str,
    model_class: type[transformers.PreTrainedModel],
    dtype: torch.dtype = torch.float32,
    rounded_to: torch.dtype | None = None,
    **overrides,
) -> transformers.PreTrainedModel:
    """Returns a model as described in ``tiny_model``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tiny_config(model_type, experts_implementation="eager", **overrides)
        model = model_class(config)
        _spread(model)
    if dtype != torch.float32:
        for copy_dtype in dict.fromkeys((rounded_to or dtype, dtype)):
            state = model.state_dict()
            model = model_class._from_config(config, dtype=copy_dtype)
            model.load_state_dict(state)
    return model.train()


@torch.no_grad()
def _spread(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        if re.search(r"experts\b", name) and "shared" not in name:
            parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
        elif re.search(r"\b(gate|router|classifier)\b", name) and len(parameter) == NUM_EXPERTS:
            parameter.normal_(std=2 / parameter.shape[-1] ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.05)


def tiny_batch(folder: str) -> dict[str, torch.Tensor]:
    """Returns ``input_ids`` and ``labels`` without the tokens that stand for images."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, FIRST_SPECIAL_TOKEN, (2, 12), generator=generator)
    if folder == "diffusion_gemma":  # a denoising model, whose loss is not its own
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids, "labels": ids.clone()}
