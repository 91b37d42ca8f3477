"""Tiny checkpoints with several stacks of layers, saved by transformers, some with an MTP layer."""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
SHARED = {"shared_expert_intermediate_size": 16}
LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
AUDIO = {
    "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "d_model": 16, "output_dim": 32, "downsample_hidden_size": 8,
}  # fmt: skip
SMALL = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


def omni() -> transformers.PreTrainedModel:
    """Returns a model with experts in the thinker and in the talker, layers 0 and 1 in both."""
    thinker = {
        "text_config": TEXT,
        "audio_config": AUDIO,
        "vision_config": VISION | {"deepstack_visual_indexes": [0]},
    }
    predictor = SMALL | {"vocab_size": 32, "hidden_size": 32, "head_dim": 8, "num_code_groups": 2}
    talker = {
        "text_config": TEXT | SHARED,
        "thinker_hidden_size": 32,
        "code_predictor_config": predictor,
        "spatial_merge_size": 2,
    }
    waves = {"codebook_size": 16, "decoder_dim": 16, "upsample_rates": (2,), "upsampling_ratios": (2,)}
    config = transformers.Qwen3OmniMoeConfig(
        thinker_config=thinker, talker_config=talker, code2wav_config=SMALL | waves | {"num_quantizers": 2}
    )
    return transformers.Qwen3OmniMoeForConditionalGeneration(config)


def qwen3_5() -> transformers.PreTrainedModel:
    """Returns a model with a vision tower and text layers, model.language_model.layers."""
    config = transformers.Qwen3_5MoeConfig(text_config=TEXT | SHARED | LINEAR, vision_config=VISION)
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


def granite() -> transformers.PreTrainedModel:
    sizes = {key: TEXT[key] for key in TEXT if key not in ("num_experts", "moe_intermediate_size")}
    return transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**sizes, num_local_experts=4))


SAVED = {
    "omni": (omni, "Qwen3OmniMoeForConditionalGeneration", None),
    "omni, thinker": (omni, "Qwen3OmniMoeThinkerForConditionalGeneration", None),
    "qwen3_5": (qwen3_5, "Qwen3_5MoeForConditionalGeneration", "mtp.layers.0"),
    "qwen3_5, text": (qwen3_5, "AutoModelForCausalLM", "mtp.layers.0"),
    "qwen3_5, text class": (qwen3_5, "Qwen3_5MoeForCausalLM", "mtp.layers.0"),
    "qwen3_next": (lambda: tiny_model("qwen3_next"), "AutoModelForCausalLM", "mtp.layers.0"),
    "deepseek_v3": (lambda: tiny_model("deepseek_v3"), "AutoModelForCausalLM", "model.layers.61"),
    "mixtral": (lambda: tiny_model("mixtral"), "AutoModelForCausalLM", None),
    "granite": (granite, "AutoModelForCausalLM", None),
}
"""Maps names to the model to save, the class to load, and the name of an additional MTP layer."""


def save(name: str, folder: Path) -> type:
    """Writes a checkpoint; returns the class to load it with."""
    make, loaded, mtp = SAVED[name]
    torch.manual_seed(0)
    model = make()
    for weight in (p for key, p in model.named_parameters() if "experts" in key):
        torch.nn.init.normal_(weight)  # transformers leaves those of a talker uninitialized
    model.save_pretrained(folder)
    if mtp:
        add_mtp_layer(folder, mtp)
    return getattr(transformers, loaded)


def add_mtp_layer(folder: Path, mtp: str) -> None:
    """Adds a layer with the tensors of layer 1 but different values."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (start,) = {name[: name.index("layers.1.")] for name in tensors if "layers.1.mlp.experts" in name}
    layer = {name: t for name, t in tensors.items() if name.startswith(f"{start}layers.1.")}
    mine = {mtp + name.removeprefix(f"{start}layers.1"): tensor * -2 for name, tensor in layer.items()}
    save_file(tensors | mine, file, {"format": "pt"})
