"""A tiny model directory."""

from pathlib import Path

import torch


def save_model(directory: Path, tokenizer, **changes) -> None:
    """Saves a random Qwen3-MoE model with a changed configuration, and a tokenizer without chat template."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "max_position_embeddings": 256,
    }  # fmt: skip
    config = Qwen3MoeConfig(vocab_size=len(tokenizer), **(sizes | changes))
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.3)
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=config.hidden_size**-0.5)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").unlink()
